"""pipeline.py: schedules as data; stages in real processes against one process; runs that lose a process."""
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

import pipeline as pipeline_file
import train
from benches.pipeline import measure
from beyond.zero_bubble import pieces_of_v
from checkpoint import load_model
from common.cli import InputError
from common.device import Device
from lowrank import replace_linears
from model import Config, Transformer, rope_tables
from pipeline import SCHEDULES, Grid, Pipeline, balance, clock_table, most_held, schedule, simulate, utilization
from recompute import use_recompute

ROOT = Path(__file__).resolve().parent.parent
LENGTH, ROWS, VOCABULARY = 7, 32, 40
CASES = list(itertools.product(("gpt2", "llama"), (0, 3), (1, 2, 4), (1, 2, 8), SCHEDULES))

# ----------------------------------------------------------------------------- schedules

@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("stages, microbatches", list(itertools.product((1, 2, 3, 4, 8), (1, 2, 4, 9, 16))))
def test_every_schedule_runs_and_is_as_good_as_the_formula(kind, stages, microbatches):
    N, M, lists = stages, microbatches, schedule(kind, stages, microbatches)
    for s, steps in enumerate(lists):
        own = (s, 2 * N - 1 - s) if kind == "zb-v" else (s,)
        kinds = "FBW" if kind.startswith("zb") else "FB"
        assert sorted(steps) == sorted(itertools.product(kinds, range(M), own))
        for stage in own:
            for first, then in zip(kinds, kinds[1:]):
                assert all(steps.index((first, m, stage)) < steps.index((then, m, stage)) for m in range(M))
    held = {"gpipe": [M] * N, "1f1b": [min(M, N - s) for s in range(N)]}
    assert [most_held(steps) for steps in lists] == held.get(kind, [most_held(steps) for steps in lists])
    if kind in held:
        for backward in (1, 2, 3):
            assert abs(utilization(simulate(lists, 1, backward)) - M / (N + M - 1)) < 1e-12
        return
    rows = simulate(lists)
    bubble = max(end for *_, end in rows) - len(lists[0])  # in clocks, where 1F1B's is 3 (N - 1) for each stage
    if kind == "zb-h1":
        assert max(map(most_held, lists)) <= N and (M < N or bubble == N - 1)
    else:
        assert max(map(most_held, lists)) <= 2 * N and bubble <= (N + 2 if M >= 2 * N else 6 * (N - 1))

def test_v_shaped_schedules_never_get_stuck():
    for N, M in itertools.product(range(1, 13), (1, 2, 3, 5, 8, 13, 25, 40)):
        assert len(simulate(schedule("zb-v", N, M))) == 6 * N * M

def test_a_schedule_whose_stages_wait_for_each_other_is_found_out():
    lists = [[(kind, m, s) for kind, m in order] for s, order in enumerate((
        (("F", 0), ("B", 0), ("F", 1), ("B", 1)), (("F", 0), ("F", 1), ("B", 1), ("B", 0))))]
    with pytest.raises(InputError, match="can't run: stages wait for each other"):
        simulate(lists)

def test_the_clock_table_is_the_schedule():
    lines = clock_table(schedule("1f1b", 2, 3)).splitlines()
    assert lines == ["clock   0  1  2  3  4  5  6  7",
                     "stage 0 F0 F1 .  B0 F2 B1 .  B2",
                     "stage 1 .  F0 B0 F1 B1 F2 B2 ."]
    assert max(map(len, clock_table(schedule("gpipe", 4, 8)).splitlines())) <= 80
    assert clock_table(schedule("zb-v", 2, 2)).splitlines()[1].startswith("process 0 F0 F1 .  f0 b0")

def test_balance_finds_the_best_of_all_cuts():
    random = np.random.default_rng(0)
    for stages in (1, 2, 3, 4, 5):
        pieces = random.integers(0, 20, 8).tolist()
        loads = [sorted((sum(pieces[a:b]) for a, b in zip((0, *cuts), (*cuts, 8))), reverse=True)
                 for cuts in itertools.combinations(range(1, 8), stages - 1)]
        ranges = balance(pieces, stages)
        assert list(itertools.chain(*ranges)) == list(range(8))
        assert sorted((sum(pieces[i] for i in r) for r in ranges), reverse=True) == min(loads)

def test_the_processes_of_a_v_are_cut_as_well_as_any_pairs():
    for count, N in ((14, 4), (14, 2), (15, 3), (10, 4), (7, 2)):
        costs = [0, *[2] * (count - 2), 10]
        pieces = pieces_of_v(costs, N)
        assert list(itertools.chain(*pieces)) == list(range(count))
        loads = [sum(costs[i] for i in (*pieces[p], *pieces[2 * N - 1 - p])) for p in range(N)]
        assert max(loads) <= max(10, 2 + 2 * -(-sum(costs) // (2 * N)))

@pytest.mark.parametrize("kind, processes, stages", [("1f1b", 9, 9), ("zb-v", 5, 10)])
def test_more_stages_than_blocks_are_refused(kind, processes, stages):
    with pytest.raises(InputError, match=f"{kind} of {processes} processes has {stages} stages, more than the "
                                         "model's 8 blocks"):
        Pipeline(make_model("gpt2", 0), processes, kind, 8, LENGTH, cpu())

# ----------------------------------------------------------------------------- stages against one process

def make_model(kind, rank, dropout=0.0, embedding_rank=0):
    torch.manual_seed(1)
    model = Transformer(Config(kind, vocab_size=VOCABULARY, context=16, blocks=8, heads=2, width=12, ffn=20,
                               kv_heads=2 if kind == "gpt2" else 1, tied=True, dropout=dropout))
    if rank:
        replace_linears(model, rank, embedding_rank=embedding_rank)
    return model

def batch():
    tokens = torch.randint(VOCABULARY, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(2))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

def whole_step(model, microbatches, seed):
    """Loss and gradients of the whole batch by autograd alone; dropout is drawn anew for each microbatch and
    piece."""
    x, y = batch()
    loss = 0
    for m, (tokens, targets) in enumerate(zip(x.chunk(microbatches), y.chunk(microbatches))):
        def draw(piece, m=m):
            torch.manual_seed(int(np.random.SeedSequence((*seed, m, piece)).generate_state(1)[0]))
        draw(0)
        h = model.embed(tokens)
        h = model.dropout(h if model.positions is None else h + model.positions.weight[:LENGTH])
        rope = rope_tables(torch.arange(LENGTH), model.config) if model.positions is None else None
        for i, block in enumerate(model.blocks):
            draw(1 + i)
            h = block(h, rope)
        logits = model.head(model.norm(h))
        loss = loss + F.cross_entropy(logits.flatten(0, 1), targets.flatten()) / microbatches
    loss.backward()
    return loss

@cache
def reference(kind, rank, microbatches):
    """Loss, gradients, and the gradients clipped to a norm of 0.01, of one process in float64."""
    model = make_model(kind, rank, 0.3).double()
    loss = whole_step(model, microbatches, (5, 6))
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    return loss.item(), gradients, {name: p.grad for name, p in model.named_parameters()}

def difference(pipeline, whole):
    """The largest relative difference of this process's gradients."""
    own = {name: p.grad for name, p in pipeline.model.named_parameters() if not p.is_meta}
    return max(((g - whole[name]).abs().max() / whole[name].abs().max()).item() for name, g in own.items())

def cpu(dtype=torch.float32):
    return Device(torch.device("cpu"), dtype, 0, "", "")

def one_case(kind, rank, stages, microbatches, name):
    model = use_recompute(make_model(kind, rank, 0.3).double(), "block" if name == "gpipe" else "sdpa")
    pipeline = Pipeline(model, stages, name, microbatches, LENGTH, cpu())
    replicas = pipeline.replicas
    whole_loss, gradients, clipped = reference(kind, rank, microbatches * replicas)
    x, y = (t.chunk(replicas)[pipeline.replica] for t in batch())
    half = len(x) // 2
    loss = pipeline.backward([(x[:half], y[:half]), (x[half:], y[half:])], (5, 6)).double()
    result = dict(gradients=difference(pipeline, gradients), loss=0)
    dist.all_reduce(loss, group=pipeline.grid.data)
    if pipeline.stages - 1 in pipeline.pieces:
        result["loss"] = abs(loss.item() / replicas / whole_loss - 1)
    pipeline.clip(0.01)
    return result | dict(clipped=difference(pipeline, clipped))

def mixed_precision(grids):
    """Names of the gradients that four stages make different from one process where products are in bf16."""
    results = []
    for stages, kind in (("alone", "1f1b"), (4, "1f1b"), (4, "zb-h1"), (4, "zb-v")):
        pipeline_file.Grid = lambda _, stages=stages: grids[stages]
        model = make_model("llama", 3, 0.3, embedding_rank=3)
        pipeline = Pipeline(model, 1 if stages == "alone" else 4, kind, 8, LENGTH, cpu(torch.bfloat16))
        pipeline.backward([batch()], (5, 6))
        results.append({n: p.grad.tolist() for n, p in model.named_parameters() if not p.is_meta})
    whole, *parts = results
    return [name for part in parts for name, bits in part.items() if bits != whole[name]]

def gathered():
    """Names of tensors that process 0 does not get as they were; and those of all stages."""
    model, cut = make_model("gpt2", 0), make_model("gpt2", 0)
    tensors = Pipeline(cut, 4, "gpipe", 2, LENGTH, cpu()).gather(dict(cut.named_parameters()))
    nothing = torch.empty(0)
    wrong = [name for name, p in model.named_parameters() if not torch.equal(tensors.get(name, nothing), p)]
    return [wrong if dist.get_rank() == 0 else [], sorted(tensors)]

def member(rank, folder):
    """One of four processes: leaves its results of everything that is compared."""
    torch.set_num_threads(1)
    grids = dict(alone=Grid(1))  # before there are other processes
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=4)
    grids |= {stages: Grid(stages) for stages in (1, 2, 4)}
    pipeline_file.Grid = grids.__getitem__  # making the groups anew for each case would take a minute
    results = dict(cases=[one_case(*case) for case in CASES], gathered=gathered())
    results["mixed"] = mixed_precision(grids)
    (folder / f"{rank}.json").write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()

@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("group")
    torch.multiprocessing.spawn(member, (folder,), nprocs=4)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(4)]

@pytest.mark.parametrize("case", CASES, ids=lambda c: "-".join(map(str, c)))
def test_loss_and_every_gradient_equal_one_process(compared, case):
    """Tied, with dropout; GPipe with recomputed blocks; the processes beyond the stages are replicas."""
    for process in compared:
        result = process["cases"][CASES.index(case)]
        for what in ("loss", "gradients", "clipped"):
            assert result[what] < 1e-12, (what, result)

def test_mixed_precision_gives_the_same_bits(compared):
    assert [process["mixed"] for process in compared] == [[]] * 4

def test_process_0_gathers_the_whole_model(compared):
    (wrong, names), *others = (process["gathered"] for process in compared)
    assert wrong == [] and len(names) == len(dict(make_model("gpt2", 0).named_parameters()))
    assert all(other == [[], []] for other in others)

# ----------------------------------------------------------------------------- train.py --pipeline

COMMON = ("--model", "tiny", "--rank", 8, "--max-iters", 8, "--log-interval", 1, "--save-interval", 2,
          "--dtype", "float32", "--seq-len", 32)

def losses(folder):
    rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == sorted({r["step"] for r in rows}), "a step stands twice"
    return [r["loss"] for r in rows] + [rows[-1]["val_loss"]]

def assert_same_losses(a, b):
    a, b = losses(a), losses(b)
    assert len(a) == len(b) == 9 and np.allclose(a, b, rtol=0, atol=2e-5), (a, b)

def pipeline_flags(text_file, out, stages, batch=8, microbatches=4):
    return [str(word) for word in (*COMMON, "--data", text_file, "--out-dir", out, "--pipeline", stages,
                                   "--batch-size", batch, "--microbatches", microbatches)]

@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, text_file):
    """The run that the others must equal: one stage in this process."""
    out = tmp_path_factory.mktemp("pipeline") / "one"
    assert train.main(pipeline_flags(text_file, out, 1)) == 0
    return out

def test_stages_on_both_arms_of_a_v_equal_one_process(tmp_path, text_file, undisturbed, run):
    done = run("train.py", *pipeline_flags(text_file, tmp_path / "v", 2), "--schedule", "zb-v", processes=2)
    assert done.returncode == 0, done.stderr
    assert "pipeline zb-v: 4 stages x 1 replicas, 4 microbatches, utilization at most" in done.stdout
    assert_same_losses(undisturbed, tmp_path / "v")

def test_two_stages_of_two_replicas_equal_one_process(tmp_path, text_file, undisturbed, run):
    flags = pipeline_flags(text_file, tmp_path / "four", 2, batch=4, microbatches=2)
    done = run("train.py", *flags, "--schedule", "gpipe", processes=4)
    assert done.returncode == 0, done.stderr
    assert "pipeline gpipe: 2 stages x 2 replicas, 2 microbatches, utilization at most 0.667" in done.stdout
    assert_same_losses(undisturbed, tmp_path / "four")

def test_a_run_goes_on_with_another_number_of_stages(tmp_path, text_file, undisturbed, run):
    out = tmp_path / "run"
    done = run("train.py", *pipeline_flags(text_file, out, 2), "--stop-at", 4, processes=2)
    assert done.returncode == 0, done.stderr
    assert train.main(["--resume", "--pipeline", "1", "--out-dir", str(out)]) == 0
    assert_same_losses(undisturbed, out)
    model, expected = (dict(load_model(folder)[0].named_parameters()) for folder in (out, undisturbed))
    assert model.keys() == expected.keys()
    assert all(torch.allclose(model[name], expected[name], atol=1e-4) for name in model)

def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]

@pytest.mark.slow
def test_a_process_lost_on_one_of_two_machines_costs_the_steps_since_the_last_save(
        tmp_path, text_file, undisturbed):
    """Two torchrun of one process each, on two addresses of this machine; the second process is killed."""
    out, agents = tmp_path / "run", []
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    for node in (0, 1):
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", 2, "--nproc_per_node", 1,
                   "--max-restarts", 3, "--rdzv_backend", "c10d", "--rdzv_endpoint", f"127.0.0.1:{port}",
                   "--rdzv_id", "test", "--rdzv_conf", f"is_host={1 - node}",
                   "--local_addr", f"127.0.0.{1 + node}", "train.py", *pipeline_flags(text_file, out, 2)]
        with open(tmp_path / f"log{node}", "w") as log:
            agents.append(subprocess.Popen(
                [str(word) for word in command], cwd=ROOT, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                env=dict(os.environ, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")))
    try:
        metrics, end = out / "metrics.jsonl", time.monotonic() + 120
        while not (metrics.exists() and metrics.read_text().count("\n") >= 5):
            assert time.monotonic() < end and agents[1].poll() is None, (tmp_path / "log1").read_text()
            time.sleep(0.01)
        os.kill(children(agents[1].pid)[0], signal.SIGKILL)
        assert [agent.wait(120) for agent in agents] == [0, 0], (tmp_path / "log0").read_text()
    finally:
        for agent in agents:
            if agent.poll() is None:
                for process in (*children(agent.pid), agent.pid):
                    os.kill(process, signal.SIGKILL)
    assert_same_losses(undisturbed, out)

@pytest.mark.parametrize("args, message", [
    (("--pipeline", 1, "--batch-size", 8, "--microbatches", 3), "8 is not divisible into 3 microbatches"),
    (("--pipeline", 2), "can't form 2 stages"),
    (("--microbatches", 2), "are of a pipeline: give --pipeline N"),
    (("--pipeline", 1, "--schedule", "zb-h1", "--compile"), "neither --compile nor --recompute block"),
    (("--pipeline", 1, "--schedule", "zb-v", "--recompute", "block"), "neither --compile nor --recompute block")])
def test_bad_input_is_refused(args, message, tmp_path, text_file):
    with pytest.raises(InputError, match=message):
        train.main([str(a) for a in (*COMMON, "--data", text_file, "--out-dir", tmp_path / "run", *args)])
    assert not (tmp_path / "run").exists()

def test_the_command_prints_the_clock_table(capsys):
    assert pipeline_file.main(["--stages", "4", "--microbatches", "8", "--schedule", "gpipe"]) == 0
    lines = capsys.readouterr().out.splitlines()
    steps = [f"F{m}" for m in range(8)] + [f"B{m}" for m in range(7, -1, -1)]
    assert lines[4].split() == ["stage", "3"] + ["."] * 3 + steps + ["."] * 3
    assert "0.727" in lines[-1]

@pytest.mark.slow
def test_measured_utilization_is_near_the_formula():
    rows = measure(stages=2, counts=(2,), seconds=0.1, rounds=1)
    assert [r["schedule"] for r in rows] == list(SCHEDULES)
    for r in rows:
        assert 0.5 * r["theory"] < r["utilization"] <= r["theory"] + 1e-3
        assert (r["theory"] > 2 / 3) == r["schedule"].startswith("zb")
        assert r["torch_utilization"] is None or r["torch_utilization"] > 0.4
    assert [r["torch_utilization"] is None for r in rows] == [False, False, True, False]
