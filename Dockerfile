# NOT BUILT YET: nobody has built or run this image. It says what belongs together on GPUs; see docs/launch.md.
#
#   docker build -t tulu-mega .
#   docker run --gpus all --ipc host --ulimit memlock=-1 -v /data:/data tulu-mega tulu-mega check sft /data/sft.toml
#
# NVIDIA's image brings CUDA, NCCL, torch, Transformer Engine and apex. It has a torch of its own, and vLLM asks for one version of torch:
# so vLLM lives in an environment beside it, with the torch it wants, and only `tulu-mega serve` runs there.
ARG PYTORCH=26.06-py3
FROM nvcr.io/nvidia/pytorch:${PYTORCH}

ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
WORKDIR /opt/tulu_mega

# What training needs beside the image's own packages, which --no-deps leaves as they are.
RUN pip install --no-deps megatron-core==0.16.1 transformers==5.19.0
COPY setup.py pyproject.toml README.md ./
COPY tulu_mega tulu_mega
COPY kernels kernels
COPY examples examples
RUN pip install datasets safetensors "pydantic>=2.7" sentencepiece tiktoken tokenizers huggingface-hub regex blake3 xxhash httpx \
      aiohttp psutil rich jinja2 "math-verify[antlr4_13_2]" langdetect matplotlib wandb \
 && pip install --no-deps .

# Rollout servers: vLLM and the torch it pins. /opt/serve/bin/tulu-mega serve ...
RUN python -m venv /opt/serve \
 && /opt/serve/bin/pip install vllm==0.32.0 \
 && /opt/serve/bin/pip install --no-deps megatron-core==0.16.1 . \
 && /opt/serve/bin/python -c "import vllm, tulu_mega"

RUN python -c "import transformer_engine, megatron.core, transformers, tulu_mega.train.engine, tulu_mega.train.reference_cache, tulu_mega.rewards"
