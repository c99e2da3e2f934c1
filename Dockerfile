# NOT BUILT YET: nobody has built or run this image. What of it needs no engine is tried: the same requirements are resolved by pip,
# and the last line's modules imported, on a CPU (tests/house/test_dockerfile.py).
#
#   docker build -t tulu-mega .
#   docker run --gpus all --ipc host --network host --ulimit memlock=-1 --cap-add IPC_LOCK --device /dev/infiniband \
#     -v /data:/data tulu-mega tulu-mega check sft /data/sft.toml
#
# --network host, IPC_LOCK and /dev/infiniband are for several machines; leave the device out where there is none. Once on a GPU:
#   docker run --gpus all tulu-mega python -c "import transformer_engine.pytorch"
#
# One environment for ranks and servers: both are members of one NCCL communicator, and NCCL joins equal releases alone. CUDA's
# major version is that of torch's wheels and of Transformer Engine's (core_cu13).
ARG CUDA=13.0.2
FROM nvidia/cuda:${CUDA}-cudnn-devel-ubuntu24.04

# An image may hold pip to versions of its own (NVIDIA's PyTorch images do, for every environment in them): not here.
ENV PIP_CONSTRAINT= PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
# Ubuntu's Python has no ensurepip without python3-venv; NCCL loads the libraries of InfiniBand where they are.
RUN apt-get update \
 && apt-get install -y --no-install-recommends python3-venv python3-dev build-essential ibverbs-providers libibverbs1 librdmacm1 \
 && rm -rf /var/lib/apt/lists/*
RUN python3 -m venv /opt/environment
ENV PATH=/opt/environment/bin:${PATH}
WORKDIR /opt/tulu_mega

COPY setup.py pyproject.toml README.md ./
COPY tulu_mega tulu_mega
COPY kernels kernels
COPY examples examples
RUN pip install ".[gpu,report,wandb]"

# What ranks, `tulu-mega serve` and vLLM's processes import; no GPU is needed for it.
RUN python -c "import tulu_mega.recipes.sft, tulu_mega.recipes.rm, tulu_mega.recipes.dpo, tulu_mega.recipes.grpo, tulu_mega.recipes.ppo, \
tulu_mega.recipes.score, tulu_mega.inference.serve, tulu_mega.inference.engine, tulu_mega.vllm_plugin.api_server, \
tulu_mega.vllm_plugin.auth, tulu_mega.vllm_plugin.batch_route, tulu_mega.vllm_plugin.bounds, tulu_mega.vllm_plugin.gate, \
tulu_mega.vllm_plugin.plugin, tulu_mega.vllm_plugin.worker, vllm.entrypoints.launchers.api_server.entry, vllm.v1.engine.core"

# Compiled against the torch that is there; 90 is the H100.
ARG ARCHS=90
RUN pip install setuptools wheel ninja \
 && CUDA_HOME=/usr/local/cuda NVTE_CUDA_ARCHS=${ARCHS} MAX_JOBS=8 \
    pip install --no-build-isolation "transformer-engine[core_cu13,pytorch]==2.11.0"
RUN python -c "from tulu_mega.platforms.releases import refuse; refuse('training', 'servers')"
