#!/usr/bin/env bash
# Installs what the tests' virtual Slurm needs. Quick when it is there; needs root and apt-get.
set -euo pipefail
for program in munged slurmctld slurmd sbatch; do
    command -v "$program" >/dev/null || missing=1
done
[ -n "${missing:-}" ] || exit 0
[ "$(id -u)" = 0 ] || { echo "install_slurm: needs root: run it with sudo" >&2 && exit 2; }
command -v apt-get >/dev/null || {
    echo "install_slurm: no apt-get here: install slurmctld, slurmd, Slurm's client and munge" >&2
    exit 2
}
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
# Their services are not for us; a container could not start them.
apt-get install -y -qq --no-install-recommends slurmctld slurmd slurm-client munge >/dev/null
