"""All stages in a row, tiny, by their command lines: what one leaves, the next takes; and what
becomes of a run that is killed, interrupted, or finds the disk full."""

import base64
import collections
import gzip
import hashlib
import json
import os
import random
import resource
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
TORCHRUN = "-m torch.distributed.run --nproc_per_node 2 --rdzv_backend c10d --rdzv_endpoint " \
    "localhost:0"

# What is run, in the order of the stages; each takes what those before it leave.
CURATE = "curate pipeline --input crawl.warc.gz --out corpus"
ENCODE = "bpe encode --tokenizer data --input mixed/mixed.jsonl.gz --out data --val_fraction .1"
TRAIN = f"train {MODEL} --data data --max_iters 200 --eval_interval 20 --learning_rate 1e-2"
DDP = "ddp --init_from out/ckpt.pt --data data --out_dir out-ddp --max_iters 240 " \
    "--eval_interval 20 --batch_size 4 --device cpu --scheme zero1"
SCALING = f"scaling sweep {MODEL} --grid learning_rate=1e-2,3e-2 --data data --max_iters 30 " \
    "--jobs 1"
SFT = "align sft --ckpt out/ckpt.pt --data sft.jsonl --out_dir out-sft --max_iters 100 " \
    "--batch_size 4 --eval_interval 10 --device cpu"


def start(command, cwd, **options):
    """A script, begun: command is its name and arguments."""
    script, *args = command.split()
    launcher = TORCHRUN.split() if script == "ddp" and args[0] != "--help" else []
    return subprocess.Popen(
        [sys.executable, *launcher, os.path.join(ROOT, f"{script}.py"), *args], cwd=cwd,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}, **options)


def finish(process, code=0, given=None):
    """-> (what it printed, what it complained of); it must end with this exit code."""
    out, err = process.communicate(given, timeout=200)
    assert process.returncode == code, err[-3000:]
    assert code or "Traceback" not in err
    return out, err


def call(command, cwd, **options):
    """Run a script to its end -> what it printed."""
    return finish(start(command, cwd, **options))[0]


def prints_of(folder):
    """{file: hash of its content} of all files under a folder."""
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*")) if path.is_file()}


def contents_of(folder):
    """{file: content}, without what depends on the clock."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        if path.name == "ckpt.pt":
            checkpoint = torch.load(path, weights_only=True)
            found[path.name] = checkpoint["step"], {k: v.tolist() for k, v in
                                                    checkpoint["model"].items()}
        elif path.name == "runs.jsonl":
            found[path.name] = {(json.dumps(run["flags"], sort_keys=True), run["loss"])
                                for run in map(json.loads, path.read_text().splitlines())}
        elif path.suffix in (".bin", ".gz") or path.name == "tokenizer.json":
            found[str(path.relative_to(folder))] = path.read_bytes()
        else:
            assert path.name in ("log.csv", "loss.png", "report.json", "state.json"), path
    return found


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
    rng = random.Random(i)
    sentences = []
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
    call(CURATE, folder)
    shards = sorted((folder / "corpus").glob("*.jsonl.gz"))
    texts = [json.loads(line)["text"] for path in shards for line in gzip.open(path, "rt")]
    assert 30 <= len(texts) <= 40
    assert len(set(texts)) == len(texts)  # the page that was there twice is there once
    assert all("number" in t and "Copyright" not in t and "var x" not in t for t in texts)
    before = prints_of(folder / "corpus")
    call(CURATE, folder)
    assert prints_of(folder / "corpus") == before

    call(f"curate mix --input web={shards[0].relative_to(folder)} notes=notes.txt --out mixed "
         "--weights web=0.9 notes=0.1", folder)
    call("bpe train --vocab_size 400 --input mixed/mixed.jsonl.gz --out data", folder)
    call(ENCODE, folder)
    before = prints_of(folder / "data")
    assert set(before) == {"train.bin", "val.bin", "tokenizer.json"}
    call(ENCODE, folder)
    assert prints_of(folder / "data") == before
    decoded = call("bpe decode --tokenizer data --input data/train.bin", folder)
    assert "is on the table.<|endoftext|>" in decoded
    assert sum(text[:40] in decoded for text in texts) >= 0.8 * len(texts)  # the rest: val.bin


def test_from_tokens_to_models_and_a_law(folder):
    call(TRAIN, folder)
    before = prints_of(folder / "out")
    again = call("train --resume", folder)
    assert "val_loss: " in again and prints_of(folder / "out") == before

    processes = [start(DDP, folder), start(SCALING, folder)]
    (ddp, _), (scaling, _) = map(finish, processes)
    assert "step    240/240" in ddp and "val_loss: " in ddp
    before = prints_of(folder / "scaling")
    processes = [start(DDP.replace("--init_from out/ckpt.pt", "--resume"), folder),
                 start(SCALING, folder)]
    (_, _), (again, _) = map(finish, processes)
    assert again.splitlines()[-2:] == scaling.splitlines()[-2:]  # the best run, and its loss
    assert prints_of(folder / "scaling") == before


def test_from_a_model_to_an_aligned_one(folder):
    (folder / "sft.jsonl").write_text("".join(json.dumps(
        {"prompt": f"Who walked to the {place}?", "response": "Anna."}) + "\n"
        for place in ("garden", "river") * 4))
    (folder / "pairs.jsonl").write_text("".join(json.dumps(
        {"prompt": f"Who saw the {place}?", "chosen": "Anna.", "rejected": "A stone."}) + "\n"
        for place in WORDS[:8]))
    (folder / "ppl.txt").write_text("Anna walked to the garden with number 7.")
    processes = [start(SFT, folder), start("align synth --kind addition --level 1 --n 8 --out "
                                           "sums.jsonl", folder)]
    [finish(process) for process in processes]
    before = prints_of(folder / "out-sft")
    processes = [
        start(SFT + " --resume", folder),
        start("align dpo --ckpt out-sft/ckpt.pt --data pairs.jsonl --out_dir out-dpo "
              "--max_iters 2 --batch_size 4 --device cpu", folder)]
    [finish(process) for process in processes]
    assert prints_of(folder / "out-sft") == before
    call("align rl --algorithm grpo --ckpt out-dpo/ckpt.pt --data sums.jsonl --out_dir out-rl "
         "--max_iters 2 --prompts_per_step 2 --group_size 4 --max_new_tokens 4 --device cpu",
         folder)
    processes = [start("align eval --task ppl --ckpt out-rl/ckpt.pt --data ppl.txt", folder),
                 start("model chat --ckpt out-rl/ckpt.pt --max_new_tokens 8", folder,
                       stdin=subprocess.PIPE)]
    evaluated, _ = finish(processes[0])
    assert 1 < float(evaluated.split("perplexity: ")[1].split()[0]) < 1e4
    finish(processes[1], given="Who walked?\n")


def test_killed_runs_go_on_to_the_same_end(folder):
    """kill -9 in the middle of the longest step of each, then the same command, or --resume."""
    cases = {  # folder of the clean run: command, the file that says that it is on its way, again
        "corpus": (CURATE, ".work", CURATE),
        "data": (ENCODE, "train.bin.tmp", ENCODE),
        "out": (TRAIN, "ckpt.pt", "train --resume"),
        "out-ddp": (DDP, "ckpt.pt", DDP.replace("--init_from out/ckpt.pt", "--resume")),
        "scaling": (SCALING, "runs.jsonl", SCALING),
        "out-sft": (SFT, "ckpt.pt", SFT + " --resume")}
    where = {}
    for name, (command, sign, _) in cases.items():
        where[name] = folder / f"killed-{name}"
        shutil.copytree(folder, where[name], ignore=lambda d, names, name=name: [
            n for n in names if n.startswith("killed") or n == name or n.endswith(".tmp")])
        if name == "data":  # of which the encoder needs the tokenizer
            (where[name] / name).mkdir()
            shutil.copy(folder / "data/tokenizer.json", where[name] / name)
    running = {name: start(cases[name][0], where[name]) for name in cases}
    waiting, killed = set(cases), set()
    while waiting:
        for name in list(waiting):
            if running[name].poll() is not None:
                waiting.remove(name)
            elif (where[name] / name / cases[name][1]).exists():
                os.killpg(running[name].pid, signal.SIGKILL)
                waiting.remove(name)
                killed.add(name)
        time.sleep(0.002)
    for process in running.values():
        process.communicate()
    assert killed >= {"out", "out-ddp", "out-sft", "scaling"}  # the others are soon over
    processes = {name: start(cases[name][2], where[name]) for name in cases}
    for name, process in processes.items():
        finish(process)
        assert contents_of(where[name] / name) == contents_of(folder / name), name


def test_a_full_disk_gets_one_line_and_leaves_no_half_file(folder):
    cases = {"corpus": CURATE, "data": ENCODE, "out": TRAIN, "scaling": SCALING, "out-sft": SFT}
    before = {name: prints_of(folder / name) for name in cases}
    for name in ("corpus", "scaling"):  # nothing would be left to do
        shutil.move(folder / name, folder / f"kept-{name}")
    full = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))}
    running = {name: start(command, folder, **full) for name, command in cases.items()}
    for name, process in running.items():
        _, err = finish(process, code=1)
        assert ": error: " in err.splitlines()[-1], (name, err)
        assert "Traceback" not in err
        if name not in ("corpus", "scaling"):
            after = prints_of(folder / name)
            assert set(after) == set(before[name])  # the old files survive, and are alone
            assert all(after[file] == before[name][file] for file in after if file != "log.csv")
        else:
            assert not [p for p in folder.glob(f"{name}/*") if p.suffix in (".gz", ".tmp")]
            shutil.rmtree(folder / name, ignore_errors=True)
            shutil.move(folder / f"kept-{name}", folder / name)


def damaged(data, rng):
    """A file with bits turned, a piece cut out, doubled, or replaced by noise."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8))):
        i, n = rng.randrange(len(data) + 1), rng.choice((1, 2, 4, 30, 400))
        how = rng.randrange(5)
        if how == 0 and i < len(data):
            data[i] ^= 1 << rng.randrange(8)
        elif how == 1:
            del data[i : i + n]
        elif how == 2:
            data[i:i] = data[i : i + n]
        elif how == 3:
            data[i : i + n] = rng.choice((b"\xff" * n, b"\0" * n, rng.randbytes(n), b"[" * n,
                                          b"9" * n, b'"', b"null", b"-1", b"1e999", b"{}"))
        else:
            del data[i:]
    return bytes(data)


def test_damaged_files_are_refused_in_one_line_or_read(folder, tmp_path):
    """What comes from outside raises ValueError or OSError, and nothing else: those are the errors
    that every main() makes a line of. Documents and pages of a crawl raise nothing: bad ones are
    skipped."""
    sys.path.insert(0, ROOT)
    import align
    import bpe
    import curate
    import model
    import scaling
    import train

    tokenizer = bpe.Tokenizer.from_file(folder / "data")
    checkpoint, _ = model.load_checkpoint(folder / "out/ckpt.pt")
    model.write_safetensors(tmp_path / "x.safetensors", checkpoint.state_dict())
    ranks = b"".join(base64.b64encode(token) + b" %d\n" % i
                     for i, token in sorted(tokenizer.vocab.items()) if i < 300)
    table = "N,C,loss\n" + "".join(f"{n},{6 * n * 20 * n},{3 - n / 1e6}\n" for n in (1000, 2000))
    curate.LinearClassifier.train(["a b c", "x y z"] * 4, ["a", "x"] * 4).save(
        str(tmp_path / "x.npz"))
    chat = json.dumps({"messages": [{"role": "user", "content": "Hi"},
                                    {"role": "assistant", "content": "Ho"}]})
    arc = json.dumps({"question": "?", "answerKey": "B",
                      "choices": {"text": ["1", "2"], "label": ["A", "B"]}})
    runs = (folder / "scaling/runs.jsonl").read_bytes()
    pages = warc([page(i) for i in range(3)])
    cases = {  # file: (content, what reads it)
        "tokenizer.json": (tokenizer.to_json().encode(), bpe.Tokenizer.from_file),
        "x.tiktoken": (ranks, bpe.Tokenizer.from_file),
        "x.bin": ((folder / "data/val.bin").read_bytes(), lambda path: (
            bpe.read_bin(path), train.open_bin(path))),
        "ckpt.pt": ((folder / "out/ckpt.pt").read_bytes(), model.load_checkpoint),
        "x.safetensors": ((tmp_path / "x.safetensors").read_bytes(), model.read_safetensors),
        "chat.jsonl": (chat.encode() + b"\n", align.read_conversations),
        "pairs.jsonl": ((folder / "pairs.jsonl").read_bytes(), align.read_pairs),
        "sums.jsonl": ((folder / "sums.jsonl").read_bytes(), align.read_problems),
        "arc.jsonl": (arc.encode() + b"\n", lambda path: align.read_task("arc", path)),
        "runs.jsonl": (runs, lambda path: scaling.columns(scaling.load_runs(path))),
        "runs.csv": (table.encode(), lambda path: scaling.columns(scaling.load_runs(path))),
        "x.npz": ((tmp_path / "x.npz").read_bytes(), curate.LinearClassifier.load),
        "texts.jsonl": (b'{"text": "one", "url": "u"}\n' * 3,
                        lambda path: list(curate.read_documents(path))),
        "pages.warc.gz": (pages, lambda path: list(curate.read_warc(path))),
        "pages.warc": (b"".join(map(gzip.decompress, [pages])),
                       lambda path: list(curate.read_warc(path))),
        "page.html": (page(1).encode(), lambda path: curate.extract_text(
            open(path, "rb").read()))}
    silent = "texts.jsonl", "pages.warc.gz", "pages.warc", "page.html"
    rng, refused, read = random.Random(5), collections.Counter(), collections.Counter()
    for name, (content, reader) in cases.items():
        path = str(tmp_path / name)
        for _ in range(60):
            with open(path, "wb") as file:
                file.write(damaged(content, rng))
            try:
                reader(path)
                read[name] += 1
            except (ValueError, OSError) as error:
                assert name not in silent and len(str(error)) < 2000
                refused[name] += 1
            except Exception as error:
                shutil.copy(path, "/tmp/damaged-" + name)
                raise AssertionError(f"{name}: {type(error).__name__}: {error}") from error
    assert set(refused) == set(cases) - set(silent)  # damage is noticed, too
    assert all(read[name] == 60 for name in silent)


def test_without_arguments(folder):
    """Each begins what its docstring says; Ctrl-C ends it without a traceback."""
    shutil.copytree(folder / "data", folder / "data/stdlib")
    assert call("model --ckpt out/ckpt.pt", folder) == call("model", folder)
    shutil.rmtree(folder / "out")
    assert "near duplicates" in call("curate", folder)
    assert "is complete" in call("curate", folder)
    commands = {"train": "parameters", "scaling": "data/scaling", "kernels": "", "align": ""}
    running = {name: start(name, folder) for name in commands}
    for name, process in running.items():
        line = process.stdout.readline() or process.stderr.readline()
        assert commands[name] in line
        process.send_signal(signal.SIGINT)
    for name, process in running.items():
        _, err = process.communicate(timeout=60)
        assert process.returncode in (0, 130), (name, err)
        assert "Traceback" not in err


def test_help(tmp_path):
    """Of all scripts at once: most of the time is taken by importing torch."""
    running = {name: start(f"{name} --help", tmp_path) for name in SCRIPTS}
    for name, process in running.items():
        out, err = finish(process)
        assert "usage: " in out and not err, name
    assert not list(tmp_path.iterdir())
