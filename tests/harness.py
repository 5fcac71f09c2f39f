"""EleutherAI's lm-evaluation-harness as an oracle: its own prompts and scoring of PIQA, WinoGrande and BoolQ, the
exported model in transformers, and the rows from a local copy."""
import json
import os
import tempfile
from pathlib import Path

from common.formats import export

FILES = dict(boolq="super_glue/boolq/default.yaml", piqa="piqa/piqa.yaml", winogrande="winogrande/default.yaml")

def harness_rows(task, data_dir, indices):
    """The rows as the harness's data sets have them, read from the source's files."""
    folder = Path(data_dir) / task
    lines = (folder / ("valid.jsonl" if task == "piqa" else "dev.jsonl")).read_text().splitlines()
    rows = [json.loads(lines[i]) for i in indices]
    if task == "piqa":
        labels = (folder / "valid-labels.lst").read_text().split()
        rows = [dict(r, label=int(labels[i])) for r, i in zip(rows, indices)]
    if task == "boolq":
        rows = [dict(r, label=int(r["answer"])) for r in rows]
    return rows

def harness_model(model, tokenizer):
    """A model of ours inside the harness, in float32."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from lm_eval.models.huggingface import HFLM
    device = next(model.parameters()).device
    with tempfile.TemporaryDirectory() as folder:
        export(model, tokenizer, Path(folder) / "hf")
        return HFLM(pretrained=f"{folder}/hf", dtype="float32", batch_size=16, device=str(device))

def harness(lm, task, rows):
    """(metrics, log-likelihoods of both endings of each row) by the harness's simple_evaluate."""
    import lm_eval
    from lm_eval.tasks import TaskManager
    theirs = Path(lm_eval.__file__).parent / "tasks" / FILES[task]
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        settings = dict(include=str(theirs), task="local", dataset_path="json", dataset_name=None, tag=[],
                        training_split=None, test_split=None,
                        dataset_kwargs=dict(data_files=dict(validation=f"{folder}/rows.jsonl"),
                                            cache_dir=f"{folder}/cache"))
        (Path(folder) / "local.yaml").write_text(json.dumps(settings))  # JSON is YAML
        tasks = TaskManager(include_path=folder, include_defaults=False)
        found = lm_eval.simple_evaluate(lm, tasks=["local"], task_manager=tasks, bootstrap_iters=0)
    results = found["results"]["local"].items()
    metrics = {k.split(",")[0]: v for k, v in results if isinstance(v, float)}
    samples = sorted(found["samples"]["local"], key=lambda s: s["doc_id"])
    return metrics, [[response[0][0] for response in s["resps"]] for s in samples]
