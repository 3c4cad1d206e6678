# source configs/cluster/offline.sh SHARED_FOLDER
# For nodes without a network. Fill the folder once where there is one:
#   export HF_HOME=SHARED_FOLDER/hub FUSIONLAB_CACHE=SHARED_FOLDER/cache
#   python -m fusionlab fit --config CONFIG --trainer.max_steps 1 --trainer.default_root_dir SHARED_FOLDER/first
# which downloads backbone and data sets and decodes the images; then source this file in every job.
: "${1:?the shared folder}"
export HF_HOME="$1/hub" FUSIONLAB_CACHE="$1/cache"
export HF_HUB_OFFLINE=1 TRANSFORMERS_OFFLINE=1 HF_DATASETS_OFFLINE=1
