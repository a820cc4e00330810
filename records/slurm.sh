#!/bin/bash
# sbatch records/slurm.sh, from the root of the repository. Each job goes on where the last stopped.
#SBATCH --job-name=q0
#SBATCH --array=1-4%1            # in turn; without %1 side by side
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=12:00:00
#SBATCH --signal=B:TERM@120      # to torchrun, which passes it on
exec torchrun --nproc_per_node=8 train_q0.py --preset q0 --epochs 64 --name big
