#!/usr/bin/env bash
# litserve 0.2.19: the OpenAI form of its server drops every request field that it does not know, answers 200, and leaves no trace of it for the model's
# code, so a steering strength sent by extra_body, or a misspelt max_token, has no effect and "steered" answers are the plain model's. Put own settings
# into "metadata", which gets through (as text), and echo them in the answer.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv; . venv/bin/activate
pip install -q --disable-pip-version-check litserve==0.2.19

cat > serve.py <<'EOF'
import json, os, signal, socket, threading, time, urllib.request
from importlib.metadata import version
import litserve

class Echo(litserve.LitAPI):
    def setup(self, device):
        pass

    def decode_request(self, request, context=None):
        context["got"] = request.model_dump()
        return request.messages

    def predict(self, messages, context=None):
        yield {"role": "assistant", "content": json.dumps({name: context["got"].get(name) for name in ("alpha", "max_token", "temperature", "metadata")})}

def ask(port):
    address = f"http://127.0.0.1:{port}"
    for _ in range(60):
        try:
            urllib.request.urlopen(f"{address}/health", timeout=2)
            break
        except OSError:
            time.sleep(1)
    body = dict(model="m", messages=[{"role": "user", "content": "hi"}], temperature=0.5, alpha=0.015, max_token=5, metadata={"alpha": "0.015"})
    request = urllib.request.Request(f"{address}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        with open("seen.json", "w") as file:
            json.dump([answer.status, json.loads(json.load(answer)["choices"][0]["message"]["content"])], file)
    os.kill(os.getpid(), signal.SIGINT)

if __name__ == "__main__":
    print("litserve", version("litserve"), "fastapi", version("fastapi"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    threading.Thread(target=ask, args=(port,), daemon=True).start()
    litserve.LitServer(Echo(spec=litserve.OpenAISpec()), accelerator="cpu").run(host="127.0.0.1", port=port, generate_client_file=False, log_level="error")
EOF
timeout 150 python serve.py || true

python - <<'EOF'
import json
status, seen = json.load(open("seen.json"))
print("status", status, "the model's code sees", seen)
# Expected: alpha and max_token get through, or a refusal such as 422.
assert seen["temperature"] == 0.5 and seen["metadata"] == {"alpha": "0.015"}
assert status == 200 and seen["alpha"] is None and seen["max_token"] is None, "changed: unknown fields get through or are refused"
EOF
