"""align.py: losses against the published formulae, masks, verifiers, evaluation, whole runs."""
import csv, gzip, json, math, os, random, re, shutil, statistics, sys, time, types
import pytest, torch
import torch.nn.functional as F

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import align as A, bpe, model as M

same = torch.testing.assert_close

@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)

def char_tokenizer(characters="0123456789+= abcdefghijklmnopqrstuvwxyz.,:?AB\n<>*/|"):
    return bpe.Tokenizer(dict(enumerate(map(str.encode, characters))), [], [bpe.EOT], "char")

def tiny(vocab_size=64, block_size=32, **more):
    return M.Transformer(M.TransformerConfig(vocab_size=vocab_size, block_size=block_size,
                                             **dict(n_layer=2, n_head=2, n_embd=16) | more))

@pytest.fixture(scope="module")
def base(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("base") / "base.pt"
    M.save_checkpoint(path, tiny(block_size=48), tokenizer=char_tokenizer().to_json())
    return path

def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path

def sums(n, **more):  # n problems of one digit; `more`: fields in place of theirs
    pairs = [(a, b) for a in range(10) for b in range(10)]
    random.Random(0).shuffle(pairs)
    return [{"prompt": f"{a}+{b}=", "response": str(a + b), "answer": str(a + b), **more}
            for a, b in pairs[:n]]

def train(kind, ckpt, data, out, more=""):
    A.run_command(f"{kind} --ckpt {ckpt} --data {data} --out_dir {out} --device cpu {more}".split())
    with open(out / "log.csv", encoding="utf-8") as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]

def assistant(ckpt, **flags):
    flags = dict(ckpt=ckpt, resume=False, device="cpu", template="", tool="", max_new_tokens=8,
                 batch_size=8) | flags
    return A.Assistant(types.SimpleNamespace(**flags))

@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("trained")
    data = write(folder / "sums.jsonl", sums(60))
    rows = train("sft", base, data, folder / "sft", "--max_iters 40 --batch_size 8 --learning_rate "
                 "2e-2 --optimizer muon")
    assert rows[-1]["loss"] < 0.6 * rows[0]["loss"] and len(rows) == 40
    return folder / "sft" / "ckpt.pt", data

def batch(B=6, T=9):  # random log-probs and a mask of unequal lengths, one of them 0
    new, old, ref = (-torch.rand(B, T, dtype=torch.float64) * 2 for _ in range(3))
    begin, length = torch.randint(0, 3, (B, 1)), torch.tensor([[0], [1], [2], [6], [4], [3]])
    t = torch.arange(T)
    return new.requires_grad_(), old, ref, (t >= begin) & (t < begin + length)

def in_parts(loss_of, *cuts):  # the loss of the rows, summed over parts of them
    return sum(loss_of(slice(a, b)) for a, b in zip(cuts, cuts[1:]))

def test_masked_reductions_and_entropy():
    x, mask = torch.arange(6.0).view(2, 3), torch.tensor([[1, 0, 1], [0, 0, 0]])
    assert A.masked_sum(x, mask, normalize_constant=4.0) == 0.5
    assert A.masked_mean(x, mask).item() == 1 and A.masked_mean(x, mask, 0).tolist() == [0, 0, 2]
    assert A.masked_mean(x, mask, dim=1).tolist() == [1, 0]  # not NaN where nothing counts
    x[0, 1] = math.nan
    assert A.masked_sum(x, mask).item() == 2  # what is masked does not matter
    logits = torch.randn(3, 5, 11)
    same(A.entropy(logits), torch.distributions.Categorical(logits=logits).entropy())
    assert A.entropy(torch.tensor([1e5, 0.0, -math.inf])).item() == 0

def test_log_probs_and_masks_of_responses():
    tokenizer = char_tokenizer("abcdefg")
    out = A.tokenize_prompts_and_responses(["ab", "c", "a"], ["cd", "defg", ""], tokenizer)
    assert out["input_ids"].tolist() == [[0, 1, 2, 3], [2, 3, 4, 5], [0, 7, 7, 7]]
    assert out["labels"].tolist() == [[1, 2, 3, 7], [3, 4, 5, 6], [7] * 4]
    assert out["response_mask"].int().tolist() == [[0, 1, 1, 0], [1] * 4, [0] * 4]
    model = tiny()
    ids, labels = out["input_ids"], out["labels"].index_fill(1, torch.tensor(3), -100)
    found = A.response_log_probs(model, ids, labels, True, 0.5)
    same(found["log_probs"], -F.cross_entropy(2 * model(ids).mT, labels, reduction="none"))
    same(found["token_entropy"], A.entropy(2 * model(ids)))
    whole = A.response_log_probs(model, ids, out["labels"])["log_probs"] * out["response_mask"]
    same(A.sequence_log_probs(model, **out), whole.sum(1))

def test_mistake_1_sft_accumulation_weighs_tokens_not_batches():
    new, _, _, mask = batch()
    whole = A.sft_loss(new, mask)
    same(whole, -new[mask].mean())
    parts = in_parts(lambda s: A.sft_loss(new[s], mask[s], mask.sum()), 0, 3, 5, 6)
    assert abs(parts.item() - whole.item()) < 1e-9
    same(*(torch.autograd.grad(loss, new)[0] for loss in (parts, whole)), atol=1e-9, rtol=0)

@pytest.mark.parametrize("average, kind", [
    ("response", "grpo"), ("constant", "dr_grpo"), ("token", "dapo")])
@pytest.mark.parametrize("high, beta", [(0.2, 0.0), (0.28, 0.04)])
def test_mistake_2_grpo_normaliser_under_accumulation(average, kind, high, beta):
    new, old, ref, mask = batch()
    a, m = torch.randn(6, dtype=torch.float64), mask.double()
    c1 = torch.exp(new - old)
    each = beta * (torch.exp(ref - new) - (ref - new) - 1) - torch.min(
        c1 * a[:, None], torch.clamp(c1, 0.8, 1 + high) * a[:, None])
    expected = {"grpo": ((each * m).sum(-1) / m.sum(-1).clamp(min=1)).mean(),
                "dr_grpo": (each * m).sum() / (6 * 20), "dapo": (each * m).sum() / m.sum()}[kind]
    weights = A.token_weights(mask, average, 20).double()  # of the whole batch, then in parts
    parts = in_parts(lambda s: (weights[s] * (A.policy_loss(new[s], a[s], old[s], (
        0.2, high)) + beta * A.kl_estimate(new[s], ref[s]))).sum(), 0, 1, 4, 6)
    assert abs(parts.item() - expected.item()) < 1e-6
    same(*(torch.autograd.grad(loss, new, retain_graph=True)[0] for loss in (parts, expected)),
         atol=1e-7, rtol=0)
    same(A.policy_loss(new, a), -a[:, None] * new)  # REINFORCE
    same(A.policy_loss(new, a, old), -a[:, None] * c1)

def test_gae_is_the_sum_it_stands_for():
    rewards, values = torch.randn(2, 3, 6, dtype=torch.float64)
    advantages, returns = A.gae(rewards, values, 0.9, 0.7)
    delta = rewards + 0.9 * torch.cat((values[:, 1:], torch.zeros(3, 1)), 1) - values
    for t in range(6):
        same(advantages[:, t], sum((0.9 * 0.7) ** (k - t) * delta[:, k] for k in range(t, 6)))
    same(returns, advantages + values)
    mask, at = torch.tensor([[0, 1, 0, 1, 1, 0]]).expand(3, 6), [1, 3, 4]  # a tool's result between
    masked, returns = A.gae(rewards, values, 0.9, 0.7, mask)
    same(masked[:, at], A.gae(rewards[:, at], values[:, at], 0.9, 0.7)[0])
    assert not returns[mask == 0].any() and not masked[mask == 0].any()

def test_preference_losses_and_group_advantages():
    pc, pr, rc, rr = -torch.rand(4, 5) * 30
    same(A.dpo_loss(pc, pr, rc, rr, 0.3), -F.logsigmoid(0.3 * ((pc - pr) - (rc - rr))).mean())
    assert abs(A.dpo_loss(rc, rr, rc, rr).item() - math.log(2)) < 1e-7
    assert A.dpo_loss(torch.tensor([-1e4]), *torch.zeros(3, 1), beta=1.0).item() == 1e4
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.1, 0.1, 0.1, 0.0, 5.0, 1.0])
    ours = A.group_advantages(rewards, 3, 1e-4).view(3, 3)
    same(ours[0], (rewards[:3] - 1 / 3) / (rewards[:3].std() + 1e-4))
    assert ours[1].tolist() == [0, 0, 0]
    same(A.group_advantages(rewards, 3, normalize_std=False)[6:], torch.tensor([-2.0, 3.0, -1.0]))
    with pytest.raises(ValueError, match="not a finite"):
        A.group_advantages([1.0, math.nan], 2)

@pytest.mark.parametrize("more", [
    {"position": "learned"}, {"attention": "sliding,full", "window": 3, "n_layer": 4}])
def test_packed_losses_equal_unpacked_ones(more):
    model, rng = tiny(**more), random.Random(1)
    examples = [([rng.randrange(60) for _ in range(n)], [int(rng.random() < 0.6) for _ in range(n)])
                for n in (rng.randrange(2, 20) for _ in range(15))]
    packed = A.pack_sequences(examples + [([0] * 40, [1] * 40)], 32)
    assert packed.pop("dropped") == 1 and len(packed["labels"]) < 8
    def loss_and_gradient(b):
        where = {name: x for name, x in b.items() if name != "response_mask"}
        loss = A.sft_loss(A.response_log_probs(model, **where)["log_probs"], b["response_mask"])
        return loss, torch.autograd.grad(loss, list(model.parameters()))
    expected = loss_and_gradient(A.collate(examples))
    same(loss_and_gradient(packed), expected, atol=2e-5, rtol=1e-4)
    del packed["positions"]
    assert abs(loss_and_gradient(packed)[0] - expected[0]) > 1e-3  # they would see each other

@pytest.mark.parametrize("template", ["plain", ""])
def test_masks_cover_what_the_assistant_says(base, template):
    talker = assistant(base, template=template)
    chat = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "yes"}, {"role": "user", "content": "a<|endoftext|>"},
            {"role": "assistant", "content": "no<|endoftext|>"}]
    for messages, text in zip((chat[:3], chat, chat[1:3]), ("yes", "no<|endoftext|>", "yes")):
        ids, mask = talker.examples(messages)[-1]
        said = ids[len(prompt := talker.encode(messages[:-1])) :]
        assert ids == prompt + said and mask == [0] * len(prompt) + [1] * len(said)
        assert said.count(talker.tokenizer.eot_id) == 1  # what people write is none
        assert talker.tokenizer.decode(said).strip() == text + "<|endoftext|>"
        assert talker.encode(messages, False) == M.encode_chat(
            talker.tokenizer, talker.template, messages, False, **talker.names)
    assert len(talker.examples(chat)) == 2

def test_formats_of_data(tmp_path):
    parts = [{"type": "text", "text": "u"}, {"type": "text", "text": "v"}]
    turns = [{"role": "user", "content": parts}, {"role": "assistant", "content": "a"}]
    rows = [{"prompt": "p", "response": "r"}, {"instruction": "i", "input": "x", "output": "o"},
            {"instruction": "i", "input": "", "output": "o"}, {"prompt": "p", "response": " "},
            {"messages": turns}]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    chats = A.read_rows(str(tmp_path / "a.json"), A.read_chat)
    assert [[m["content"] for m in chat] for chat in chats] == [
        ["p", "r"], ["i\n\nx", "o"], ["i", "o"], ["uv", "a"]]
    pairs = [*({"prompt": "p", "chosen": "c", "rejected": x} for x in "rc"),
             {"chosen": turns, "rejected": [turns[0], {"role": "assistant", "content": "r"}]}]
    text = "\n".join(map(json.dumps, pairs))
    (tmp_path / "p.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    read = A.read_rows(str(tmp_path / "p.jsonl.gz"), A.read_pair)
    assert [[chat[-1]["content"] for chat in pair] for pair in read] == [["c", "r"], ["a", "r"]]
    rows = {"question": "q", "answer": "so 1+1\n#### 2"}, {"problem": "q", "answer": 3}
    assert [A.read_problem(row)["answer"] for row in rows] == ["2", "3"]

@pytest.mark.parametrize("row", [
    '"prompt": 3, "answer": "b"}', '"prompt": ', '"prompt": "a"}', '"":' + "[" * 100_000,
    *('"prompt": "p", "answer": "%s"}' % answer for answer in ("", "5=6", "(")),
    *('"prompt": "p", "tests": %s}' % tests for tests in (
        "[]", "5", '"assert f( == 1"', '["", " "]', '[{"input": "1"}]'))])
def test_rows_that_no_verifier_can_read_are_reported_when_loaded(tmp_path, row):
    path = tmp_path / "bad.jsonl"
    path.write_text('{"prompt": "a", "answer": "1"}\n{' + row)
    with pytest.raises(ValueError, match="bad.jsonl, row [12]: "):
        A.read_rows(str(path), A.read_problem)

def table(text):  # "a | b; c | d" -> [["a", "b"], ["c", "d"]]
    return [[*map(str.strip, pair.split("|"))] for pair in text.split(";")]

WRONG = [(text, "5") for text, in table(r"""not 5; minus 5; half of 5; at least 5; 5 dozen; 500%;
    5!; between 4 and 5; 6 or 5; It is 5; \[6 - 5i\]; (2, 5); $52_8$; \boxed{x > 5}; \boxed{\pm 5};
    5=6; \boxed{5; 5 million; log 5; 5 dozen per hour; 12 miles per 5 hours; 2x=5; x = 5 or 6;
    \boxed{5 \text{ or } 6}""")] + table(r"""15 cm^2 | 2; 8 | $52_8$; 53530/97 | x; 5 m | 5 cm;
    {1,1,2} | {1,2,2}; 5=6 | 6; 0.333 | 1/3; 9^9^9^9 | 1; (1,2) | (2,1); 2x-y=0 | 2x+y=0; i | -i;
    1e999999999 | 1; x+2 | 2; 10^{20} | 10^{20}+1; x<3 | (-\infty,3]; \sqrt{x^2} | x; 5, | 5, 6;
    __import__('os').system('id') | 0; (((2^60)^60)^60)^60 | 1; \sin^{-1} x | \frac{1}{\sin x};
    \sin 30 | 1/2; \sin 45^\circ | 45; \log 100 | \ln 100; \sin x^2 | \sin^2 x; 5 m/s | 5 km/h;
    0.1% | 10%; 3!! | 720; 12 | \pm 12; 0=0 | x+y=0; 1\frac32 | 5/2; |""") + [
    ("{" * 900, "1"), (r"\boxed{" * 3000, "1"), ("9" * 19_000,) * 2, ("#### 6\n5", "5")]
RIGHT = [(rf"\boxed{{{text}}}", truth) for text, truth in table(r"""\mathbf{9} | 9; y = 2x | 2x;
    pi/2 | \frac{\pi}{2}; 3*sqrt(5) | 3\sqrt{5}; yx | xy; (a,b) = (-2,1) | (-2,1); 5! | 120;
    m\angle ABC = 30^\circ | 30; x<3 | (-\infty,3); 7a-2b+5=0 | -7a+2b-5=0; 12, -12 | \pm 12;
    \binom52 | 10; 17, 20, and 31 | 17,20,31; yes | Yes; 15\text{ cm}^2 | 15; 1/2 | 0.5; 50% | 0.5;
    2x+3 | 3+2x; \frac{\sqrt{2}}{2} | 1/\sqrt{2}; 1,234 | 1234; 3\frac12 | 3.5; \ln(2) | \ln 2;
    \begin{pmatrix} 1 & \frac12 \\ 3 & 4 \end{pmatrix} | \begin{pmatrix}1&0.5\\3&4\end{pmatrix};
    x \in [-2,7] | [-2, 7]; 2\ln 2 | \ln 4; \log_2 8 | 3; \sin 2x | 2\sin x\cos x; 5 m/s^2 | 5;
    \sin 30^\circ | 1/2; \cos(\pi/3) | 0.5; \tan 45^\circ | 1; \sin^2 x | (\sin x)^2; 0.1 | 10\%;
    \frac{\sin x}{2} | \frac12\sin(x); \$1.5 \text{ million} | 1500000; 2 \le x < 3 | [2,3);
    12 \text{ miles per hour} | 12; (1,2)\cup(3,4) | (1, 2) \cup (3, 4)""")] + [
    ("The answer is 42.", "42"), ("she has 18 left.\n#### 18", "18"), ("5 tans", "5"), ("5.0", "5"),
    ("**Answer: 12**", "12"), ("so #### 72", "it is\n#### 72"), ("<answer>7</answer>", "7"),
    (r"\boxed{5}. We may check our answer: it fits", "5"), ("$1,234.00", "1234"), ("x = 5", "5")]

def test_answers():
    begin = time.perf_counter()
    assert [pair for pair in RIGHT if not A.grade_math(*pair)] == []
    assert [pair for pair in WRONG if A.grade_math(*pair)] == []
    assert len(RIGHT) > 30 < len(WRONG) and time.perf_counter() - begin < 5

def test_choices():
    for text, letter in table(r"""The answer is (B). | B; B | B; (C) because | C; D. a leaf | D;
            it must be C | C; \boxed{D} | D; A seems right. The answer is B | B"""):
        assert A.find_choice(text) == letter, text
    assert {*map(A.find_choice, ("A or B", "A cat sat on it", "cannot be A", "not A", "E", "A, B",
                                 "(A) (B) (C) (D)")), A.find_choice("I think", 10)} == {None}

def test_instructions_of_ifeval():
    text = "Dr. Smith met Mrs. Jones at 5 p.m. today."  # one sentence, of 9 words
    for name, more, good, bad in (
            ("forbidden_words", {"forbidden_words": ["cat"]}, "category", "a Cat."),
            ("frequency", {"keyword": "Less than", "frequency": 1}, "less than 2", "less"),
            ("number_sentences", {"num_sentences": 2, "relation": "less than"}, text, "Yes. No!"),
            ("number_sentences", {"num_sentences": 2}, "It is 5 p.m. He left!", text),
            ("number_words", {"num_words": 9.0}, text, "two words"),
            ("number_bullet_lists", {"num_bullets": 2}, "* a\n- b", "* a\n* b\n* c"),
            ("number_placeholders", {"num_placeholders": 2}, "[a] [b c]", "[a]"),
            ("end_checker", {"end_phrase": "The end."}, 'x. "the end."\n', "The end. x"),
            ("quotation", {}, '"x"', 'x"'), ("no_comma", {}, "a", "a, b"),
            ("english_capital", {}, "ABC 1", "ABc"), ("english_lowercase", {}, "abc", "Abc")):
        row = {"instruction_id_list": [f"of:{name}"], "kwargs": [{"relation": "at least"} | more]}
        assert [A.verify(row, said) for said in (good, bad, " ")] == [1, 0, 0], name
    row = {"instruction_id_list": ["of:quotation"], "kwargs": [None]}
    for text in 'Sure:\n"x"', '"x"\nBye', 'Sure:\n"x"\nBye', '*"x"*', 'Sure:\n*"x"*':
        assert A.follows(row, text) == [False] and A.follows(row, text, True) == [True], text

def test_code_that_is_right_passes():
    for code, tests in (
            ("def f(x): return x + 1", ["assert f(1) == 2", "assert f(x=1e999) == 1e999"]),
            ("import math\ndef h(x):\n    if x < 0: raise ValueError\n    return x / 2, {x}",
             "assert math.isclose(h(1)[0], 0.5) and h(1) == (0.5, {1})\ntry:\n    h(-1)\n"
             "except ValueError: pass\nelse: assert 0"),
            ("print(2 * int(input()))", [{"input": "3\n", "output": "6\n"},
                                         {"input": "4", "output": "8"}]),
            ("def f(a, d, s): return a.sort(), d.clear(), s.add(2)", "a, d, s = [3, 1], {1: 2}, {1}"
             "\nf(a, d, s=s)\nassert [a, d, s] == [[1, 3], {}, {1, 2}]")):  # changed in place
        assert A.run_code(code, tests) == (True, "")
    assert {A.run_code("def f(): 0", tests) for tests in ([], "", "# f")} == {(False, "no tests")}
    fenced = "Here:\n```python\ndef f(x):\n    return 2 * x\n```\nas you asked"
    assert A.verify({"tests": ["assert f(2) == 4"]}, fenced) == 1

def test_code_runs_with_limits_alone_where_no_filter_is(monkeypatch, capsys):
    monkeypatch.setattr(A, "SANDBOX", A.SANDBOX.replace("platform.machine()", "'sparc'"))
    A.print_once.cache_clear()
    assert A.run_code("def f(): return 1", "assert f() == 1") == (True, "")
    assert A.run_code(FORGERIES["wrong"], "assert f(1) == 2") == (False, "AssertionError: ")
    assert A.run_code(FORGERIES["endless"], "f(1)", 1.0) == (False, "timeout")
    assert capsys.readouterr().err.count("without seccomp") == 1

ALL = "import os\nfor n in range(20):\n    try: os.write(n, {})\n    except OSError: pass\n"
FORGERIES = {
    "wrong": "def f(x): return x", "syntax": "def f(:", "leaves": "import os\nos._exit(0)",
    "leaves when called": "import sys\ndef f(x): sys.exit(0)",
    "equal to all": "class E(int):\n    def __eq__(s, o): return True\n    __hash__ = None\n"
    "def f(x): return E(5)",
    "shadows": "def all(x): return True\ndef isinstance(*a): return True\ndef f(x): return 1",
    "writes a verdict": ALL.format("b'[true, \"\"]'") + "def f(x): return 1",
    "writes answers": ALL.format("b\"('', ['all', 'f'])\\n\" * 9") + "def f(x): return 1",
    "frames": "import sys\ndef f(x):\n    frame = sys._getframe()\n    while frame:\n"
    "        frame.f_locals.update(verdict='')\n        frame = frame.f_back\n    return 1",
    "memory": "x = 'a' * 10**10\ndef f(x): return 2", "endless": "def f(x):\n    while True: pass",
    "a program that knows one answer": "print(4)"}

@pytest.mark.parametrize("name", FORGERIES)
def test_code_that_cheats_fails(name):
    tests = [{"input": str(n), "output": str(2 * n)} for n in (2, 3)] if "program" in name else (
        "assert all([f(1) == 2]) and isinstance(f(1), int)")
    verdict = A.run_code(FORGERIES[name], tests, timeout=1.5)
    assert not verdict and verdict.error and (verdict.error == "timeout" or name != "endless")

def test_system_calls_are_refused(tmp_path):
    calls = ("os.mknod(p)", "os.mkfifo(p)", "os.stat('/')", "os.readlink('/proc/self/exe')",
             "open('/proc/self/maps')", "os.setpriority(0, 0, 5)", "os.fork()", "os.kill(1, 0)")
    code = (f"import os\np = '{tmp_path}/x'\nn = 0\n" + "".join(
        f"try:\n    {call}\nexcept OSError:\n    n += 1\n" for call in calls) +
        "n += not os.access('/', 0)\ndef f(): return n")
    assert A.run_code(code, f"assert f() == {len(calls) + 1}") == (True, "")
    assert not list(tmp_path.iterdir())

def test_mistake_7_scoring_tokenizes_context_and_continuation_as_one():
    vocab = {0: b"a", 1: b" ", 2: b"b", 3: b" b", 4: b"ab"}
    tokenizer = bpe.Tokenizer(vocab, [(b" ", b"b"), (b"a", b"b")], ["<|endoftext|>"], r"[\s\S]+")
    assert A.encode_continuation(tokenizer, "a", " b") == ([0, 3], 1)
    assert A.encode_continuation(tokenizer, "a ", "b") == ([0, 3], 1)  # not [0, 1] + [2]
    assert A.encode_continuation(tokenizer, "a", "b")[0] == [4]  # not [0] + [2]
    assert A.encode_continuation(tokenizer, "", "b") == ([tokenizer.eot_id, 2], 1)

def test_intervals_and_pass_at_k():
    assert A.share([True, False] * 50) == "0.5000 (0.4038 to 0.5962)"
    assert A.share([False] * 10) == "0.0000 (0.0000 to 0.2775)"
    assert A.share([True] * 9) == "1.0000 (0.7008 to 1.0000)" and A.share([])[:6] == "0.0000"
    assert A.pass_at_k(10, 3, 4) == 1 - 7 * 6 * 5 * 4 / (10 * 9 * 8 * 7)  # without replacement

def test_tasks_are_read_as_published(tmp_path, base, capsys):
    choices = {"text": ["x", "yy"], "label": ["1", "2"]}
    arc = {"question": "Why?", "answerKey": "2", "choices": choices}
    def read(task, row, cot=False):
        return A.read_item(types.SimpleNamespace(task=task, cot=cot), row)
    item = read("arc", arc)
    assert (item["context"], item["target"], item["label"]) == ("Question: Why?\nAnswer:", " yy", 1)
    assert read("piqa", {"goal": "Do", "sol1": "a", "sol2": "b", "label": 0})["target"] == " a"
    item = read("hellaswag", {"activity_label": "Cook", "ctx_a": "A [x] man.", "ctx_b": "he",
                              "endings": ["eats [title] it", "runs"], "label": "1"})
    assert item["context"] + item["target"] == "Cook: A man. He runs" and item["label"] == 1
    item = read("arc", arc, cot=True)
    assert item["problem"] == {"answerKey": "B", "n": 2} and "\nB. yy\nAnswer:" in item["context"]
    item = read("mmlu", ["Q?", "w", "x", "y", "z", "C"])
    assert item["context"] == "Q?\nA. w\nB. x\nC. y\nD. z\nAnswer:" and item["target"] == " C"
    path = tmp_path / "art.csv"
    path.write_text('"Q, one?",w,x,y,z,C\nQ2\u2028,w,x,y,z,A\n', "utf-8")
    A.run_command(f"eval --task mmlu --ckpt {base} --data {path} --fewshot 1".split())
    assert "\n8 of 8 texts lose" in (out := capsys.readouterr().out) and "n: 2\nacc: " in out

class Scripted:  # in place of a checkpoint: right if "paris" was looked up
    def __init__(self, args):
        self.room, self.tokenizer = 500, char_tokenizer()
    def respond(self, prompts, temperature, seed):
        said = iter(["4", "so 4.", "4", "7", "7", "so 6"] * len(prompts))
        texts = map(self.tokenizer.decode, prompts)
        return [([], [], f"#### {4 if 'paris is' in text else next(said)}") for text in texts]

def test_answers_are_judged_voted_and_looked_up(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(A, "Assistant", Scripted)
    rows = [{"question": "2+2", "answer": "4"}, {"question": "1+5", "answer": "6"}]
    path = write(tmp_path / "p.jsonl", rows)
    A.run_command(f"eval --task gsm8k --ckpt x --data {path} --samples 3".split())
    out = capsys.readouterr().out
    assert "\nacc: 0.5000" in out and "pass@2: 0.5000 (" in out and "majority@3: 0.5000" in out
    passages = ["the cat sat on the mat", "paris is a town", "a cat and a dog, a cat"]
    best = A.bm25(passages)
    assert best("what is paris", 1) == [passages[1]] and best("cat dog", 2)[0] == passages[2]
    docs = write(tmp_path / "d.jsonl", [{"text": "\n\n".join(passages)}])
    path = write(tmp_path / "q.jsonl", [{"question": "what is in paris", "answer": "4"}] * 2)
    A.run_command(f"eval --task gsm8k --ckpt x --data {path} --retrieve {docs}".split())
    out = capsys.readouterr().out
    assert "\nacc: 0.5000" in out and "\nopen_acc: 1" in out and "\nlast_number_acc: 1" in out

def test_a_judge_that_likes_a_place_decides_nothing(tmp_path, base, capsys, monkeypatch):
    data = write(tmp_path / "p.jsonl", [{"prompt": "q", "chosen": "a", "rejected": "b"}] * 3)
    likes = [1, 0, 0, 1, 0, 1, 1, 0, 1, 0, 1, 0]  # the first, the second, what comes first
    monkeypatch.setattr(A, "score", lambda model, asked, size: likes[: len(asked)])
    A.run_command(f"judge --ckpt {base} --data {data} --device cpu".split())
    out = capsys.readouterr().out
    assert "pairs: 3\nfirst_preferred: 1\nsecond_preferred: 1\nwin_rate: 0.5000" in out

def test_perplexity_of_text(tmp_path, base, capsys):
    text = "one plus one is two. " * 9
    (tmp_path / "t.txt").write_text(text)
    A.run_command(f"eval --task ppl --ckpt {base} --data {tmp_path}/t.txt --device cpu".split())
    out = dict(line.split(": ") for line in capsys.readouterr().out.splitlines())
    ids = torch.tensor([[char_tokenizer().eot_id] + char_tokenizer().encode(text)])
    windows = [ids[:, i : i + 49] for i in range(0, len(text), 48)]
    total = sum(F.cross_entropy(M.load_checkpoint(base)[0](x[:, :-1])[0], x[0, 1:], reduction="sum")
                for x in windows)
    assert int(out["tokens"]) == len(text) and abs(float(out["loss"]) - total / len(text)) < 1e-3

def test_the_calculator_writes_results_that_are_not_learned(base, monkeypatch):
    talker = assistant(base, max_new_tokens=30, tool="calculator")
    script = iter(["ab<<48/2=", " 7=", "x<|endoftext|>"])
    monkeypatch.setattr(talker.model, "generate", lambda prompts, *_, **__: [
        [*ids, *talker.tokenizer.encode(next(script))] for ids in prompts])
    (ids, mask, text), = talker.respond([[1, 2]], 1.0)
    assert text == "ab<<48/2=24>> 7=x"
    assert [i for i, m in zip(ids, mask) if not m] == [1, 2] + talker.tokenizer.encode("24>>")
    (ids, mask), = talker.examples([{"role": role, "content": text} for role, text in (
        ("user", "a"), ("assistant", "b<<1+1=2>>c"))])
    assert talker.tokenizer.decode([i for i, m in zip(ids, mask) if m]) == "b<<1+1=c<|endoftext|>"
    assert [*map(A.calculate, ("1/8", "2*(3+4)", "x", "9^400", "i"))] == ["0.125", "14", *"???"]

def test_packing_and_accumulation_do_not_change_training(tmp_path, base, trained):
    data, losses = write(tmp_path / "d.jsonl", sums(8)), []
    for flags in ("--no_packing", "", "--gradient_accumulation_steps 3"):
        rows = train("sft", base, data, tmp_path / "o", "--max_iters 4 --batch_size 8 "
                     f"--learning_rate 1e-3 {flags}")
        losses.append(sum([[row["loss"], row["grad_norm"]] for row in rows], []))
    assert losses[1:] == [pytest.approx(losses[0], rel=1e-4)] * 2
    one, two = ([row.get("loss", 0) for row in train(
        "rl", *trained, tmp_path / "rl", f"--algorithm dapo --micro_batch {size} --minibatches 2 "
        "--max_iters 4 --prompts_per_step 4 --group_size 4 --max_new_tokens 3 --learning_rate 1e-3"
    )] for size in (1024, 1))
    assert one == pytest.approx(two, abs=1e-4) and any(one)

@pytest.mark.parametrize("kind, flags", [
    ("sft", "--batch_size 4 --optimizer muon"),
    ("rl", "--algorithm ppo --max_new_tokens 3 --kl 0.1 --prompts_per_step 4 --group_size 2")])
def test_resume_is_exact(tmp_path, trained, kind, flags, capsys):
    flags += " --learning_rate 1e-3 --eval_interval 3"
    whole = train(kind, *trained, tmp_path / "whole", f"{flags} --max_iters 6")
    own = shutil.copytree(trained[0].parent, tmp_path / "part") / "ckpt.pt"  # is moved aside, and
    train(kind, own, trained[1], own.parent, f"{flags} --max_iters 3")
    A.run_command(f"{kind} --resume --out_dir {own.parent} --max_iters 6".split())  # found again
    part = M.load_checkpoint(own)[1]["rows"]
    assert [r["loss"] for r in whole] == [float(r["loss"]) for r in part] and len(part) == 6
    assert capsys.readouterr().out.endswith(f"ckpt: {tmp_path}/part/ckpt.pt\n")

def test_dpo_reward_model_and_what_it_is_for(tmp_path, trained):
    pairs = [{"prompt": p["prompt"], "chosen": p["answer"], "rejected": "no"} for p in sums(100)]
    data, test = write(tmp_path / "a.jsonl", pairs[:80]), write(tmp_path / "b.jsonl", pairs[80:])
    rows = train("dpo", trained[0], data, tmp_path / "dpo", f"--val_data {test} --max_iters 20 "
                 "--learning_rate 2e-3 --eval_interval 10 --gradient_accumulation_steps 2")
    assert abs(rows[0]["loss"] - math.log(2)) < 1e-6
    assert rows[-1]["margin"] > 0.1 and rows[-1]["val_accuracy"] == 1
    rows = train("reward", trained[0], data, tmp_path / "rm", f"--val_data {test} --max_iters 15 "
                 "--learning_rate 1e-2")
    assert rows[-1]["val_accuracy"] == 1
    rows = train("rl", *trained, tmp_path / "rl", f"--reward_model {tmp_path}/rm/ckpt.pt "
                 "--max_iters 2 --prompts_per_step 2 --group_size 2 --max_new_tokens 3")
    assert len(rows) == 2 and rows[0]["reward"] not in (0, 1)

@pytest.mark.parametrize("algorithm", "grpo reinforce ppo dr_grpo dapo expert".split())
def test_rl_makes_rewarded_answers_likelier(tmp_path, trained, algorithm, capsys):
    data = write(tmp_path / "p.jsonl", sums(30, answer="1"))  # of all
    more = "--minibatches 2 --kl 0.01" if algorithm in ("ppo", "grpo") else ""
    rows = train("rl", trained[0], data, tmp_path / "rl", f"--algorithm {algorithm} --val_data "
                 f"{data} --max_iters 12 --prompts_per_step 16 --group_size 8 --max_new_tokens 3 "
                 f"--learning_rate 5e-3 --eval_interval 12 --micro_batch 48 {more}")
    assert statistics.mean(r["reward"] for r in rows[-3:]) > rows[0]["reward"] + 0.2
    assert {"reward", "solved", "length", "entropy", "kl"} <= set(rows[0])
    data = write(tmp_path / "p.jsonl", sums(10, answer="impossible"))
    train("rl", trained[0], data, tmp_path / "rl", f"--algorithm {algorithm} --max_iters 2 "
          "--prompts_per_step 4 --max_new_tokens 3")  # equal rewards change nothing
    assert "=' -> '" in (out := capsys.readouterr().out)  # a sample answer
    assert ("nothing was learned" in out) == (algorithm != "ppo")

def test_synthetic_data(tmp_path, base):
    docs, out = write(tmp_path / "d.jsonl", [{"text": "one"}] * 2), tmp_path / "r.jsonl"
    for flags in f"--ckpt {base} --rewrite {docs}", "--kind word", "--kind addition":
        A.run_command(f"synth --out {out} --device cpu --n 20 --max_new_tokens 9 {flags}".split())
        rows = [json.loads(line) for line in out.read_text().splitlines()]
        assert 0 < len(rows) <= 20
        for p in [] if "rewrite" in flags else rows:
            a, b, *c = map(int, re.findall(r"\d+", p["prompt"]))
            assert int(p["answer"]) == (a * b + c[0] if c else a + b)
            assert A.grade_math(p["response"], p["answer"])

def test_usage_errors(tmp_path, base, trained, capsys, monkeypatch):
    common = f"--ckpt {base} --out_dir {tmp_path}/o"
    def fails(line):  # -> what main() ends with, and writes to stderr
        monkeypatch.setattr(sys, "argv", ["align.py", *line.split()])
        with pytest.raises(SystemExit) as stopped:
            A.main()
        return stopped.value.code, capsys.readouterr().err
    for line in (f"sft {common} --batch_size x", "nothing", "rl --algorithm no"):
        assert re.fullmatch("2 .+\n", "{} {}".format(*fails(line)))
    for flags in ("--data x.jsonl", "--resume", f"--data {base}", *(
            f"--data {trained[1]} --optimizer muon --learning_rate 1e{i}" for i in (39, 400))):
        error, _ = fails(f"sft {common} {flags}")
        assert error.startswith("align.py: error: ") and "\n" not in error, flags
    assert not os.path.exists(tmp_path / "o" / "ckpt.pt")
