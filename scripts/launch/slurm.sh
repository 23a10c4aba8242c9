#!/bin/bash
# One process a node, with all its GPUs: doctor.py, then the command. Submit from the clone; sbatch's own options win:
#   sbatch --nodes=2 --gpus-per-node=8 scripts/launch/slurm.sh scripts/generate.py --prompt "Once" --mesh data=2,tensor=8
# VENV is the virtual environment (default .venv in the clone), which all nodes must see.
#SBATCH --job-name=llama_jax
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=01:00:00
#SBATCH --output=%x-%j.out
set -euo pipefail

if [ $# -eq 0 ]; then
  echo "usage: sbatch --nodes=2 scripts/launch/slurm.sh scripts/generate.py --prompt ..." >&2
  exit 2
fi
cd "${SLURM_SUBMIT_DIR:?submit this with sbatch}"
python="${VENV:-$SLURM_SUBMIT_DIR/.venv}/bin/python"

# srun does not take --cpus-per-task from sbatch since SLURM 22.05.
run=(srun --kill-on-bad-exit=1 --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" "$python")
"${run[@]}" scripts/doctor.py --timeout 180
"${run[@]}" "$@"
