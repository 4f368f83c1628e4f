#!/usr/bin/env bash
# litellm 1.110.2: the key of its response cache has the request fields that OpenAI names and leaves out extra_body and fields of a server's own. Two requests
# that differ in nothing but a steering strength (or guided decoding, or repetition_penalty) share one entry, so the "steered" answers are the base model's,
# without a warning; temperature is told apart. Set litellm.enable_caching_on_provider_specific_optional_params, or name the strength in `model`. (A hit
# also needs fastapi, orjson and soundfile, which litellm does not install; without them it raises ModuleNotFoundError.)
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv; . venv/bin/activate
pip install -q --disable-pip-version-check litellm==1.110.2 fastapi==0.165.0 orjson==3.13.0 soundfile==0.14.0

cat > asked.py <<'EOF'
import json, threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import version

import litellm
from litellm.caching.caching import Cache

class Echo(BaseHTTPRequestHandler):
    """An OpenAI-like server that answers with what it was asked for."""

    def log_message(self, *args):
        pass

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = f"alpha {asked.get('alpha')} temperature {asked.get('temperature')}"
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}}
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        content = json.dumps(
            {"id": "1", "object": "chat.completion", "created": 1, "model": asked["model"], "choices": [choice], "usage": usage}
        ).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

server = HTTPServer(("127.0.0.1", 0), Echo)
threading.Thread(target=server.serve_forever, daemon=True).start()

def answer(model, **more):
    messages = [{"role": "user", "content": "Are bats blind?"}]
    reply = litellm.completion(
        model=f"openai/{model}", api_base=f"http://127.0.0.1:{server.server_port}/v1", api_key="none", messages=messages, caching=True, **more
    )
    return reply.choices[0].message.content

print("litellm", version("litellm"))
litellm.cache = Cache(type="local")
seen = {
    "extra_body": [answer("a", extra_body={"alpha": alpha}) for alpha in (0, 0.02)],
    "field": [answer("b", alpha=alpha) for alpha in (0, 0.02)],
    "temperature": [answer("c", temperature=value) for value in (0, 1)],
    "model": [answer(f"d@{alpha}", extra_body={"alpha": alpha}) for alpha in (0, 0.02)],
}
litellm.enable_caching_on_provider_specific_optional_params = True
seen["extra_body, with the switch"] = [answer("e", extra_body={"alpha": alpha}) for alpha in (0, 0.02)]
for name, answers in seen.items():
    print(f"{name}: {answers}")
steered = ["alpha 0 temperature None", "alpha 0.02 temperature None"]
# Expected: the second answer of each is its own.
assert seen["temperature"] == ["alpha None temperature 0", "alpha None temperature 1"]
assert seen["model"] == seen["extra_body, with the switch"] == steered
assert seen["extra_body"] == seen["field"] == steered[:1] * 2, "changed: other fields are in the cache's key"
EOF
LITELLM_LOCAL_MODEL_COST_MAP=True python asked.py
