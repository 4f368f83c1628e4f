#!/usr/bin/env bash
# dspy 3.4.1: its cache, which is on by default and kept on disk, leaves api_base out of the key. Two servers that serve one model's name, say llama.cpp's with
# and without a control vector at two ports, or one that was started anew with another vector, are not told apart: the second is never asked, and its
# "answers" are the first one's, also in a later process. Pass cache=False, or give each server's model a name of its own.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m venv venv; . venv/bin/activate
pip install -q --disable-pip-version-check dspy==3.4.1

cat > ask.py <<'EOF'
import json, sys, threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib.metadata import version

import dspy

def server(name):
    """The address of an OpenAI-like server that answers with its name, and the requests that it got."""
    got = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            got.append(asked)
            choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": f"from {name}"}}
            usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
            content = json.dumps(
                {"id": "1", "object": "chat.completion", "created": 1, "model": asked["model"], "choices": [choice], "usage": usage}
            ).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    http = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{http.server_port}/v1", got

def answer(base, model="openai/smollm2", **more):
    text = dspy.LM(model, api_base=base, api_key="none", temperature=0.0, **more)("Are bats blind?")[0]
    return text if isinstance(text, str) else text["text"]

names = sys.argv[1:]
for name in names:
    base, got = server(name)
    seen = {
        "cached": answer(base),
        "requests": len(got),
        "with cache=False": answer(base, cache=False),
        "own name": answer(base, f"openai/smollm2-{name}"),
        "extra_body": answer(base, extra_body={"alpha": name}),
    }
    print("dspy", version("dspy"), "litellm", version("litellm"), name, json.dumps(seen))
    # Expected: every answer is from the server that is asked.
    assert seen["with cache=False"] == seen["own name"] == seen["extra_body"] == f"from {name}"
    first = name == "base"
    assert seen["cached"] == "from base" and seen["requests"] == int(first), "changed: the cache tells servers apart"
EOF
export DSPY_CACHEDIR=$work/cache LITELLM_LOCAL_MODEL_COST_MAP=True
python ask.py base steered
python ask.py restarted
