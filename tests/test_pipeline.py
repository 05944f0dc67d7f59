"""All stages in a row, tiny, by their command lines: what one leaves, the next takes; one run that
is killed; --help and the bare run of every script."""

import contextlib
import gzip
import importlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SCRIPTS = "bpe model train kernels ddp scaling curate align".split()
MODEL = "--n_layer 1 --n_head 2 --n_embd 32 --block_size 32 --batch_size 4 --device cpu"
TRAIN = f"train {MODEL} --data data --max_iters 90 --eval_interval 15 --learning_rate 1e-2"

def start(command, cwd):
    """A script, begun: command is its name and arguments."""
    script, *args = command.split()
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return subprocess.Popen(
        [sys.executable, *(launcher if script == "ddp" else []),
         os.path.join(ROOT, f"{script}.py"), *args], cwd=cwd, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True, start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"})

def finish(process, code=0):
    """-> (what it printed, what it complained of); it must end with this exit code."""
    out, err = process.communicate(timeout=200)
    assert process.returncode == code, err[-3000:]
    assert "Traceback" not in err
    return out, err

def call(command, cwd, given=""):
    """A script's main -> what it printed; in this process, as importing torch takes seconds."""
    script, *args = command.split()
    if script in ("bpe", "curate"):  # (these start at once)
        return finish(start(command, cwd))[0]
    out = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out):
        patch.chdir(cwd)
        patch.setattr(sys, "argv", [f"{script}.py", *args])
        patch.setattr(sys, "stdin", io.StringIO(given))
        patch.setattr(signal, "signal", lambda *_: None)  # pytest keeps its own handlers
        try:
            importlib.import_module(script).main()
        except SystemExit as end:
            assert not end.code, end
    return out.getvalue()

def warc(pages):
    """Pages as a gzipped WARC, a member each."""
    out = b""
    for i, html in enumerate(pages):
        body = b"HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=utf-8\r\n\r\n" + html.encode()
        head = (f"WARC/1.0\r\nWARC-Type: response\r\nWARC-Target-URI: http://example.com/{i}\r\n"
                f"Content-Type: application/http; msgtype=response\r\nContent-Length: {len(body)}"
                "\r\n\r\n").encode()
        out += gzip.compress(head + body + b"\r\n\r\n")
    return out

WORDS = """garden market river school winter summer teacher farmer letter window mountain village
bridge doctor kitchen basket apple horse silver paper morning evening stone forest harbor captain
music painter castle meadow""".split()
VERBS = "found carried painted watched followed remembered described borrowed sold".split()

def page(i):
    """A page whose article has sentences of its own, between a menu and a footer."""
    rng, sentences = random.Random(i), []
    for _ in range(16):
        a, b, c, d = rng.sample(WORDS, 4)
        start = f"The {a} of the {b} {rng.choice(VERBS)} that {c}"
        end = rng.choice(["and", "but", "because", "while", "before", "after", "until", "when"])
        sentences.append(
            f"{start} {end} {rng.choice(('she', 'he', 'they', 'we', 'nobody'))} "
            f"{rng.choice(VERBS)} {rng.choice(('a', 'one', 'this', 'every'))} {d} to be "
            f"with {rng.choice(WORDS)} number {rng.randrange(9999)}.")
    paragraphs = "".join(f"<p>{' '.join(sentences[k : k + 4])}</p>" for k in (0, 4, 8, 12))
    return (f"<html><head><title>Page {i}</title><script>var x = 1;</script></head><body><nav><a "
            f"href='/'>Home</a> <a href='/a'>About</a></nav><article><h1>A story, part {i}</h1>"
            f"{paragraphs}</article><footer>Copyright 2020</footer></body></html>")

@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pipeline")

def test_from_pages_to_tokens(folder):
    (folder / "crawl.warc.gz").write_bytes(warc([page(i) for i in range(40)] + [page(3)]))
    (folder / "notes.txt").write_text("<|endoftext|>".join(
        f"Note {i}: the {WORDS[i % 30]} is on the table." for i in range(200)))
    call("curate pipeline --input crawl.warc.gz --out corpus", folder)
    shards = sorted((folder / "corpus").glob("*.jsonl.gz"))
    texts = [json.loads(line)["text"] for path in shards for line in gzip.open(path, "rt")]
    assert 30 <= len(texts) <= 40 and len(set(texts)) == len(texts)  # each page once
    assert all("number" in t and "Copyright" not in t and "var x" not in t for t in texts)
    call(f"curate mix --input web={shards[0].relative_to(folder)} notes=notes.txt --out mixed "
         "--weights web=0.9 notes=0.1", folder)
    call("bpe train --vocab_size 400 --input mixed/mixed.jsonl.gz --out data", folder)
    call("bpe encode --tokenizer data --input mixed/mixed.jsonl.gz --out data --val_fraction .1",
         folder)
    assert {path.name for path in (folder / "data").iterdir()} == {
        "train.bin", "val.bin", "tokenizer.json"}
    decoded = call("bpe decode --tokenizer data --input data/train.bin", folder)
    assert "is on the table.<|endoftext|>" in decoded
    assert sum(text[:40] in decoded for text in texts) >= 0.8 * len(texts)  # the rest: val.bin

def losses(folder):
    return [line.split(",")[3:5] for line in (folder / "log.csv").read_text().splitlines()]

def test_from_tokens_to_models_and_a_law(folder):
    running = [start(TRAIN + " --out_dir killed", folder), start(
        f"scaling sweep {MODEL} --grid learning_rate=1e-2 --data data --max_iters 30", folder)]
    call(TRAIN, folder)
    while not (folder / "killed/ckpt.pt").exists():
        time.sleep(0.01)
    os.killpg(running[0].pid, signal.SIGKILL)  # as a power cut would
    running[0].communicate()
    finish(running[1])
    running = start("ddp --init_from out/ckpt.pt --data data --out_dir out-ddp --max_iters 40 "
                    "--batch_size 4 --device cpu --scheme zero1", folder)
    call("train --resume --out_dir killed", folder)
    finish(running)
    assert losses(folder / "killed") == losses(folder / "out")
    one, two = (torch.load(folder / name / "ckpt.pt", weights_only=True)["model"]
                for name in ("out", "killed"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    runs = [json.loads(line) for line in (folder / "scaling/runs.jsonl").read_text().splitlines()]
    assert len(runs) == 1 and runs[0]["loss"] < 6
    assert torch.load(folder / "out-ddp/ckpt.pt", weights_only=True)["step"] == 40

def test_from_a_model_to_an_aligned_one(folder):
    (folder / "sft.jsonl").write_text("".join(json.dumps(
        {"prompt": f"Who walked to the {place}?", "response": "Anna."}) + "\n"
        for place in ("garden", "river") * 4))
    (folder / "pairs.jsonl").write_text("".join(json.dumps(
        {"prompt": f"Who saw the {place}?", "chosen": "Anna.", "rejected": "A stone."}) + "\n"
        for place in WORDS[:8]))
    (folder / "ppl.txt").write_text("Anna walked to the garden with number 7.")
    call("align sft --ckpt out/ckpt.pt --data sft.jsonl --out_dir out-sft --max_iters 20 "
         "--batch_size 4 --device cpu", folder)
    call("align dpo --ckpt out-sft/ckpt.pt --data pairs.jsonl --out_dir out-dpo --max_iters 2 "
         "--batch_size 4 --device cpu", folder)
    call("align synth --kind addition --level 1 --n 8 --out sums.jsonl", folder)
    call("align rl --algorithm grpo --ckpt out-dpo/ckpt.pt --data sums.jsonl --out_dir out-rl "
         "--max_iters 2 --prompts_per_step 2 --group_size 4 --max_new_tokens 4 --device cpu",
         folder)
    assert "perplexity" in call("align eval --task ppl --ckpt out-rl/ckpt.pt --data ppl.txt",
                                folder)
    assert len(call("model chat --ckpt out-rl/ckpt.pt --max_new_tokens 8", folder, "Who?\n")) > 1
    assert torch.load(folder / "out-rl/ckpt.pt", weights_only=True)["step"] == 2

def test_without_arguments(folder):
    """Each begins what its docstring says; Ctrl-C ends it without a traceback."""
    shutil.copytree(folder / "data", folder / "data/stdlib")
    models = [start(command, folder) for command in ("model", "model --ckpt none.pt")]
    names = ("train", "scaling", "kernels", "align", "curate")
    running = {name: start(name, folder) for name in names}
    for name, process in running.items():
        assert process.stdout.readline() or process.stderr.readline(), name
        process.send_signal(signal.SIGINT)
    for name, process in running.items():
        _, err = process.communicate(timeout=60)
        assert process.returncode in (0, 130, -signal.SIGINT), (name, err)
        assert "Traceback" not in err
    assert len(finish(models[0])[0]) > 20
    assert finish(models[1], 1)[1].startswith("model.py: error: none.pt")

@pytest.mark.parametrize("name", SCRIPTS)
def test_help(tmp_path, name):
    assert len(call(f"{name} --help", tmp_path)) > 150 and not list(tmp_path.iterdir())
