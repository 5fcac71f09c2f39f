"""The paper's seven sets: their files, prompts and scores, and rows to finetune on."""
