"""The part that a reader of PPO may skip: flags, device, optimizer, checkpoints, metrics, processes, earlier stages."""
