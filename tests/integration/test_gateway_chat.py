"""`p2pmodel serve` with a model whose tokenizer has a chat template, behind a key."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import openai
import pytest

from p2pmodel import starter
from p2pmodel.cli.localswarm import LocalSwarm

pytestmark = pytest.mark.timeout(240)
KEY = "a-key-of-this-test-0001"
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    "# {{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}# assistant:{% endif %}"
)


def test_a_chat_is_what_its_template_makes_of_it(tmp_path: Path) -> None:
    model = shutil.copytree(starter.MODEL, tmp_path / "chatty")
    config = json.loads((model / "tokenizer_config.json").read_text())
    (model / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": TEMPLATE}))
    (tmp_path / "keys").write_text(KEY)
    with LocalSwarm(tmp_path) as swarm:
        node = swarm.start("node", "--model", str(model), "--threads", "1")
        swarm.wait_until_serving()
        command = [sys.executable, "-m", "p2pmodel", "serve", "--port", "0", "--host", "0.0.0.0", "--model", str(model)]
        options = [
            "--base",
            str(model),
            "--peers",
            node.address,
            "--home",
            str(tmp_path / "gateway"),
            "--codec",
            "fp32",
        ]
        refused = subprocess.run([*command, *options], capture_output=True, text=True, check=False)
        assert refused.returncode == 2
        assert "--api-key-file" in refused.stderr
        process = subprocess.Popen(
            [*command, *options, "--api-key-file", str(tmp_path / "keys")], stdout=subprocess.PIPE, text=True
        )
        try:
            assert process.stdout
            port = process.stdout.readline().split("/v1")[0].rpartition(":")[2]
            with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=KEY, max_retries=0) as ai:
                check(ai)
            with (
                openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="x", max_retries=0) as stranger,
                pytest.raises(openai.AuthenticationError),
            ):
                stranger.models.list()
        finally:
            process.terminate()
            assert process.wait(20) == 0


def check(ai: openai.OpenAI) -> None:
    chat = ai.chat.completions.create(
        model="chatty", messages=[{"role": "user", "content": "import os"}], temperature=0, max_completion_tokens=8
    )
    plain = ai.completions.create(model="chatty", prompt="# user: import os\n# assistant:", temperature=0, max_tokens=8)
    assert chat.choices[0].message.content == plain.choices[0].text
    with pytest.raises(openai.BadRequestError, match="no system here"):
        ai.chat.completions.create(model="chatty", messages=[{"role": "system", "content": "x"}])
