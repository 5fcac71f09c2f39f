"""What goes beyond the paper. Delete this folder, and `python train.py --rank 192` still works."""
