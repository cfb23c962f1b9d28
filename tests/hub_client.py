"""Content for a Hub on loopback, and requests to it without a client's library, or from another process."""

import hashlib
import http.client
import json
import os
import subprocess
import sys
from contextlib import closing

import pytest


TEXT = b"one line\n"
CUT = "peer closed connection|IncompleteRead"  # httpx, requests
TENSORS = bytes(range(256)) * 1000
UPLOADING = [
    pytest.mark.usefixtures("plain_client"),
    # the client's own upload by LFS, with httpx
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),
]


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def in_another_process(script, endpoint, home):
    """What a script prints in a process whose Hub is `endpoint` and whose cache and settings are in `home`."""
    environment = os.environ | {"HF_ENDPOINT": endpoint, "HF_HOME": str(home)}
    environment |= {"HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    run = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    return run.stdout


def adapters_placed(repo_id, endpoint, home):
    """Names of five adapters that another process puts on the tiny Llama by a repository's blueprint, by plain PEFT."""
    script = (
        "import json; from peft import get_peft_model; from peft_blueprint import BlueprintConfig\n"
        "from peft_blueprint.testing import tiny_llama\n"
        f"config = BlueprintConfig(blueprint={repo_id!r}, num_modules=5, r=2)\n"
        "model = get_peft_model(tiny_llama(layers=12), config)\n"
        "print(json.dumps(sorted(n for n, _ in model.named_modules() if n.endswith('lora_A'))))\n"
    )
    return json.loads(in_another_process(script, endpoint, home))


class Reply:
    """The whole answer to one request, part of which a client's library would hide."""

    def __init__(self, url, method="GET", body=None, token=None, **headers):
        address, _, path = url.removeprefix("http://").partition("/")
        if token is not None:
            headers["Authorization"] = f"Bearer {token}"
        with closing(http.client.HTTPConnection(address, timeout=30)) as connection:
            connection.request(method, f"/{path}", body, headers)
            answer = connection.getresponse()
            self.status, self.headers, self.content = answer.status, answer.headers, answer.read()

    def followed(self, **headers):
        return Reply(self.headers["Location"], **headers) if self.status == 302 else self
