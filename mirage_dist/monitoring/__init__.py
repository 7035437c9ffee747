"""Where a run's records go besides metrics.jsonl: W&B and TensorBoard, each served by a process of its own.

    process.Sender     the handle that training and evaluation hold; never blocks and never raises
    sender             that process: reads metrics.jsonl as it grows and gives each record to one sink
    sinks              what a sink is
    wandb_run          W&B
    wandb_files        what the files of offline W&B runs hold
    tensorboard        TensorBoard event files

metrics.jsonl is the truth. A sink says which steps it holds, and gets the others, whatever ended its last process.
"""
