"""pipeline.py: schedules as data; stages in real processes against one process; runs that lose a process."""
import dataclasses
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

import train
from benches.plan import plan
from checkpoint import load_model
from common.cli import InputError
from lowrank import replace_linears
from model import Config, Transformer, config_for, rope_tables
from pipeline import SCHEDULES, Grid, Pipeline, balance, clock_table, measure, schedule, simulate, stored, utilization
from recompute import use_recompute

ROOT = Path(__file__).resolve().parent.parent
LENGTH, ROWS, VOCABULARY = 7, 32, 40
CASES = list(itertools.product(("gpt2", "llama"), (0, 3), (1, 2, 4), (1, 2, 8), SCHEDULES))


# ----------------------------------------------------------------------------- schedules

@pytest.mark.parametrize("kind, stages, microbatches", list(itertools.product(SCHEDULES, (1, 2, 3, 4, 8), (1, 2, 4, 9, 16))))
def test_every_schedule_runs_and_is_as_good_as_the_formula(kind, stages, microbatches):
    lists = schedule(kind, stages, microbatches)
    for steps in lists:
        assert sorted(steps) == sorted((k, m) for k in "FB" for m in range(microbatches))
        assert all(steps.index(("F", m)) < steps.index(("B", m)) for m in range(microbatches))
    for backward in (1, 2, 3):
        assert abs(utilization(simulate(lists, 1, backward)) - microbatches / (stages + microbatches - 1)) < 1e-12
    bound = [min(microbatches, stages - s) if kind == "1f1b" else microbatches for s in range(stages)]
    assert [stored(steps) for steps in lists] == bound


def test_a_schedule_whose_stages_wait_for_each_other_is_found_out():
    with pytest.raises(InputError, match="can't run: stages wait for each other"):
        simulate([[("F", 0), ("B", 0), ("F", 1), ("B", 1)], [("F", 0), ("F", 1), ("B", 1), ("B", 0)]])


def test_the_clock_table_is_the_schedule():
    lines = clock_table(schedule("1f1b", 2, 3)).splitlines()
    assert lines == ["clock   0  1  2  3  4  5  6  7",
                     "stage 0 F0 F1 .  B0 F2 B1 .  B2",
                     "stage 1 .  F0 B0 F1 B1 F2 B2 ."]
    assert max(map(len, clock_table(schedule("gpipe", 4, 8)).splitlines())) <= 80


def test_balance_finds_the_best_of_all_cuts():
    random = np.random.default_rng(0)
    for stages in (1, 2, 3, 4, 5):
        pieces = random.integers(0, 20, 8).tolist()
        loads = [sorted((sum(pieces[a:b]) for a, b in zip((0, *cuts), (*cuts, 8))), reverse=True)
                 for cuts in itertools.combinations(range(1, 8), stages - 1)]
        ranges = balance(pieces, stages)
        assert list(itertools.chain(*ranges)) == list(range(8))
        assert sorted((sum(pieces[i] for i in r) for r in ranges), reverse=True) == min(loads)
    with pytest.raises(InputError, match="7 stages are more than the model's 6 blocks"):
        balance(pieces, 7)


# ----------------------------------------------------------------------------- stages in processes, against one process

def make_model(kind, rank, dropout=0.0, embedding_rank=0):
    torch.manual_seed(1)
    config = Config(kind, vocab_size=VOCABULARY, context=16, blocks=4, heads=2, kv_heads=2 if kind == "gpt2" else 1, width=12, ffn=20, tied=True,
                    dropout=dropout)
    model = Transformer(config)
    if rank:
        replace_linears(model, rank, embedding_rank=embedding_rank)
    return model


def batch():
    tokens = torch.randint(VOCABULARY, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(2))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


def whole_step(model, microbatches, seed):
    """Loss and gradients of the whole batch by autograd alone, with dropout drawn anew for each microbatch and piece."""
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
        loss = loss + F.cross_entropy(model.head(model.norm(h)).flatten(0, 1), targets.flatten()) / microbatches
    loss.backward()
    return loss


@cache
def reference(kind, rank, microbatches):
    """Loss, gradients, their norm, and the gradients clipped to a norm of 0.01, of one process in float64."""
    model = make_model(kind, rank, 0.3).double()
    loss = whole_step(model, microbatches, (5, 6))
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
    return loss.item(), gradients, norm.item(), {name: p.grad for name, p in model.named_parameters()}


def difference(pipeline, whole):
    """The largest relative difference of this process's gradients."""
    own = {name: p.grad for name, p in pipeline.model.named_parameters() if not p.is_meta}
    return max(((g - whole[name]).abs().max() / whole[name].abs().max()).item() for name, g in own.items())


def one_case(grids, kind, rank, stages, microbatches, name):
    grid = grids[stages]
    whole_loss, gradients, norm, clipped = reference(kind, rank, microbatches * grid.replicas)
    model = use_recompute(make_model(kind, rank, 0.3).double(), "block" if name == "gpipe" else "sdpa")
    pipeline = Pipeline(model, grid, name, microbatches)
    x, y = (t.chunk(grid.replicas)[grid.replica] for t in batch())
    loss = pipeline.step(x, y, (5, 6))
    result = dict(gradients=difference(pipeline, gradients), held=pipeline.most_held, planned=stored(pipeline.steps), loss=0)
    dist.all_reduce(loss, group=grid.data)
    if grid.last:
        result["loss"] = abs(loss.item() / grid.replicas / whole_loss - 1)
    result["norm"] = abs(pipeline.clip(0.01).item() / norm - 1)
    return result | dict(clipped=difference(pipeline, clipped))


def mixed_precision(alone, four):
    """Names of the gradients that with four stages, and activations in bf16, are not the very bits of one process's."""
    results = []
    for grid in (alone, four):
        pipeline = Pipeline(make_model("llama", 3, 0.3, embedding_rank=3), grid, "1f1b", 8, autocast=lambda: torch.autocast("cpu", torch.bfloat16))
        pipeline.step(*batch(), (5, 6))
        results.append({n: p.grad.tolist() for n, p in pipeline.model.named_parameters() if not p.is_meta})
        assert pipeline.dtype == torch.bfloat16
    return [name for name, bits in results[1].items() if bits != results[0][name]]


def gathered(grids):
    """Names of tensors that process 0 does not get as they were; and those of all stages."""
    model, pipeline = make_model("gpt2", 0), Pipeline(make_model("gpt2", 0), grids[4], "gpipe", 2)
    tensors = pipeline.gather(dict(pipeline.model.named_parameters()))
    wrong = [name for name, p in model.named_parameters() if not torch.equal(tensors.get(name, torch.empty(0)), p)]
    return [wrong if dist.get_rank() == 0 else [], sorted(tensors)]


def member(rank, folder):
    """One of four processes: leaves its results of everything that is compared."""
    torch.set_num_threads(1)
    alone = Grid(1)  # before there are other processes
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=4)
    grids = {stages: Grid(stages) for stages in (1, 2, 4)}
    results = dict(cases=[one_case(grids, *case) for case in CASES], mixed=mixed_precision(alone, grids[4]), gathered=gathered(grids))
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
        for what in ("loss", "gradients", "norm", "clipped"):
            assert result[what] < 1e-12, (what, result)
        assert result["held"] == result["planned"]


def test_activations_travel_in_the_dtype_they_have(compared):
    assert [process["mixed"] for process in compared] == [[]] * 4


def test_process_0_gathers_the_whole_model(compared):
    (wrong, names), *others = (process["gathered"] for process in compared)
    assert wrong == [] and len(names) == len(dict(make_model("gpt2", 0).named_parameters())) and all(o == [[], []] for o in others)


# ----------------------------------------------------------------------------- train.py --pipeline

COMMON = ("--model", "tiny", "--rank", 8, "--max-iters", 8, "--log-interval", 1, "--save-interval", 2, "--dtype", "float32", "--seq-len", 32,
          "--eval-tokens", 128, "--eval-interval", 8, "--dropout", 0.1)


def losses(folder):
    rows = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == sorted({r["step"] for r in rows}), "a step stands twice"
    return [r["loss"] for r in rows] + [rows[-1]["val_loss"]]


def assert_same_losses(a, b):
    assert len(losses(a)) == len(losses(b)) == 9 and np.allclose(losses(a), losses(b), rtol=0, atol=2e-5), (losses(a), losses(b))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, text_file):
    """The run that the others must equal: one stage in this process."""
    out = tmp_path_factory.mktemp("pipeline") / "one"
    arguments = (*COMMON, "--data", text_file, "--batch-size", 8, "--pipeline", 1, "--microbatches", 4, "--out-dir", out)
    assert train.main([str(a) for a in arguments]) == 0
    return out


def test_two_stages_of_two_replicas_equal_one_process(tmp_path, text_file, undisturbed, run):
    done = run("train.py", *COMMON, "--data", text_file, "--batch-size", 4, "--pipeline", 2, "--microbatches", 2, "--schedule", "gpipe",
               "--trace", tmp_path / "trace.json", "--out-dir", tmp_path / "four", processes=4)
    assert done.returncode == 0, done.stderr
    assert_same_losses(undisturbed, tmp_path / "four")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert sorted((e["tid"], e["name"]) for e in events if e["ph"] == "X") == [(s, k + m) for s in (0, 1) for k in "BF" for m in "01"]
    assert (tmp_path / "trace.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_goes_on_with_another_number_of_stages(tmp_path, text_file, undisturbed, run):
    out = tmp_path / "run"
    done = run("train.py", *COMMON, "--data", text_file, "--batch-size", 8, "--pipeline", 2, "--microbatches", 4, "--stop-at", 4, "--out-dir", out,
               processes=2)
    assert done.returncode == 0, done.stderr
    assert train.main(["--resume", "--pipeline", "1", "--out-dir", str(out)]) == 0
    assert_same_losses(undisturbed, out)
    model, expected = (dict(load_model(folder)[0].named_parameters()) for folder in (out, undisturbed))
    assert model.keys() == expected.keys() and all(torch.allclose(model[n], expected[n], atol=1e-4) for n in model)


def children(pid):
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
def test_a_killed_process_on_one_of_two_machines_costs_the_steps_since_the_last_save(tmp_path, text_file, undisturbed):
    """Two torchrun of one process each, on two addresses of this machine; the second one's process is killed in the middle."""
    out, agents = tmp_path / "run", []
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    for node in (0, 1):
        command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", 2, "--nproc_per_node", 1, "--max-restarts", 3, "--rdzv_backend", "c10d",
                   "--rdzv_endpoint", f"127.0.0.1:{port}", "--rdzv_id", "test", "--rdzv_conf", f"is_host={1 - node}",
                   "--local_addr", f"127.0.0.{1 + node}",
                   "train.py", *COMMON, "--data", text_file, "--batch-size", 8, "--pipeline", 2, "--microbatches", 4, "--out-dir", out]
        with open(tmp_path / f"log{node}", "w") as log:
            agents.append(subprocess.Popen([str(c) for c in command], cwd=ROOT, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                                           env=dict(os.environ, TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")))
    try:
        metrics, end = out / "metrics.jsonl", time.monotonic() + 120
        while not (metrics.exists() and metrics.read_text().count("\n") >= 5):
            assert time.monotonic() < end and agents[1].poll() is None, (tmp_path / "log1").read_text()
            time.sleep(0.01)
        victim = children(agents[1].pid)[0]
        os.kill(victim, signal.SIGKILL)
        assert [agent.wait(120) for agent in agents] == [0, 0], (tmp_path / "log0").read_text()
    finally:
        for process in (p for agent in agents if agent.poll() is None for p in (*children(agent.pid), agent.pid)):
            os.kill(process, signal.SIGKILL)
    logs = (tmp_path / "log0").read_text() + (tmp_path / "log1").read_text()
    assert "error (process " in logs and f"pid {victim})" in logs, "the one that is left names the lost one"
    assert_same_losses(undisturbed, out)


@pytest.mark.parametrize("args, message", [
    (("--pipeline", 1, "--batch-size", 8, "--microbatches", 3), "--batch-size 8 is not divisible into 3 microbatches"),
    (("--pipeline", 2), "1 process can't form 2 stages"),
    (("--microbatches", 2), "--microbatches and --trace are of a pipeline: give --pipeline N")])
def test_bad_input_is_refused(args, message, tmp_path, text_file):
    with pytest.raises(InputError, match=message):
        train.main([str(a) for a in (*COMMON, "--data", text_file, "--out-dir", tmp_path / "run", *args)])
    assert not (tmp_path / "run").exists()


def test_the_batch_follows_the_microbatches_where_none_is_given():
    from common.device import find_device
    device = dataclasses.replace(find_device("float32"), torch_device=torch.device("cpu"))
    for microbatches, batch in ((None, 4), (2, 4), (3, 6), (8, 8)):
        argv = ["--model", "tiny"] + (["--microbatches", str(microbatches)] if microbatches else [])
        assert train.defaults(train.parse(argv)[0], device).batch_size == batch


def test_the_command_prints_the_clock_table_and_draws_it(tmp_path, capsys):
    import pipeline
    assert pipeline.main(["--stages", "4", "--microbatches", "8", "--schedule", "gpipe", "--out", str(tmp_path / "p.png")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[4].split() == ["stage", "3"] + ["."] * 3 + [f"F{m}" for m in range(8)] + [f"B{m}" for m in range(7, -1, -1)] + ["."] * 3
    assert "0.727" in lines[-1] and (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


# ----------------------------------------------------------------------------- measured utilization, and the plan

@pytest.mark.slow
def test_measured_utilization_is_near_the_formula():
    rows = measure(stages=2, counts=(2,), seconds=0.1, rounds=1)
    assert [r["schedule"] for r in rows] == list(SCHEDULES)
    for r in rows:
        assert r["theory"] == 2 / 3 and 0.5 * r["theory"] < r["utilization"] <= r["theory"] + 1e-3
        assert 0 < r["torch_utilization"] <= r["theory"] + 1e-3


def test_the_plan_adds_up():
    with torch.device("meta"):
        model = Transformer(config_for("llama2-7b"))
    rows = plan(model, 16, sequences=64)
    assert [(r["stages"], r["replicas"], r["microbatches"]) for r in rows] == [(1, 16, 4), (2, 8, 8), (4, 4, 16), (8, 2, 32), (16, 1, 64)]
    assert rows[0]["bubble"] == 0 and rows[-1]["gradient_seconds"] == 0
    numbers = sum(p.numel() for p in model.parameters())
    assert 16 * numbers < rows[0]["memory_bytes"] < 16 * numbers + 10e9
    assert all(a["memory_bytes"] > b["memory_bytes"] for a, b in zip(rows, rows[1:])) and sum(r["best"] for r in rows) == 1
    with pytest.raises(InputError, match="no share-out of 2 GPUs fits 24 GB"):
        plan(model, 2, gigabytes=24)
