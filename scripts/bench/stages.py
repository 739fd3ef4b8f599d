"""Time per token through 1, 2 and 3 stages against the same model in this process, and the memory of a node.

    python scripts/bench/stages.py [--tokens 64] [--repetitions 5] [--hidden 768 --layers 12]

Every stage is a real node on loopback with one thread. Local and remote runs alternate; greedy, fp32 all the way, so
the tokens have to be the same. The overhead is what a token costs more than locally, per hop, in wall milliseconds and
in the nodes' and this process's CPU milliseconds.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"

import psutil
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from p2pmodel import starter
from p2pmodel.cli.localswarm import LocalSwarm
from p2pmodel.cli.rehearsal import split_layers
from p2pmodel.engine.checkpoint import load_whole
from p2pmodel.node.client import Sampling, SwarmClient

PROMPT = "def read_lines(path):\n    "


def random_llama(folder: Path, hidden: int, layers: int) -> Path:
    """A random checkpoint with the starter's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(starter.MODEL)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=12,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def family(pid: int) -> list[psutil.Process]:
    process = psutil.Process(pid)
    return [process, *process.children(recursive=True)]


def cpu_seconds(pids: list[int]) -> float:
    return sum(sum(p.cpu_times()[:2]) for pid in pids for p in family(pid))


def local_run(model: LlamaForCausalLM, client: SwarmClient, tokens: int) -> tuple[float, float, str]:
    ids = client.tokenizer(PROMPT, return_tensors="pt").input_ids
    ids = torch.cat([torch.tensor([[client.tokenizer.bos_token_id]]), ids], dim=1)
    began, cpu = time.monotonic(), time.process_time()
    out = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
    text = client.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    return time.monotonic() - began, time.process_time() - cpu, text


def measure(checkpoint: Path, stages: int, tokens: int, repetitions: int) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, LocalSwarm(Path(folder)) as swarm:
        layers = load_whole(checkpoint).config.num_hidden_layers
        first = None
        for index, span in enumerate(split_layers(layers, stages)):
            peers = ("--peers", first.address) if first else ()
            node = swarm.start(
                f"host-{index}", "--model", str(checkpoint), "--layers", str(span), "--threads", "1", *peers
            )
            node.wait_until_serving(time.monotonic() + 180)
            first = first or node
        assert first is not None
        pids = [node.process.pid for node in swarm.nodes.values()]
        model = load_whole(checkpoint).eval()
        rows = []
        with SwarmClient.connect(Path(folder) / "client", (first.address,), str(checkpoint), checkpoint) as client:
            for repetition in range(repetitions + 1):
                here, here_cpu, expected = local_run(model, client, tokens)
                nodes, own = cpu_seconds(pids), time.process_time()
                answer = client.generate(PROMPT, Sampling(tokens), "head", "fp32", lambda _: None)
                cpu = cpu_seconds(pids) - nodes + time.process_time() - own
                assert answer.text == expected, "the swarm and the local model disagree"
                if repetition:
                    rows.append((here, answer.seconds, here_cpu, cpu))
        here, there, here_cpu, cpu = (statistics.median(column) / tokens * 1e3 for column in zip(*rows, strict=True))
        hops = stages
        print(
            f"| {stages} | {here:.2f} | {there:.2f} | {there / here:.2f} | {(there - here) / hops:.2f} | "
            f"{here_cpu:.2f} | {cpu:.2f} | {(cpu - here_cpu) / hops:.2f} |",
            flush=True,
        )
        if stages == 3:
            weights = (checkpoint / "model.safetensors").stat().st_size / stages / 1e6
            for name, node in swarm.nodes.items():
                members = family(node.process.pid)
                pss = sum(p.memory_full_info().pss for p in members) / 1e6
                print(f"{name}: {len(members)} processes, {pss:.0f} MB PSS, with about {weights:.0f} MB of weights")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--hidden", type=int, default=0, help="of a random Llama; 0 takes the starter model")
    parser.add_argument("--layers", type=int, default=12)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = random_llama(Path(folder), args.hidden, args.layers) if args.hidden else starter.MODEL
        print("| stages | local ms | swarm ms | ratio | ms/hop | local CPU ms | all CPU ms | CPU ms/hop |")
        print("|---|---|---|---|---|---|---|---|")
        for stages in (1, 2, 3):
            measure(checkpoint, stages, args.tokens, args.repetitions)


if __name__ == "__main__":
    main()
