"""querybridge: the packages by name, because a flat layout is not discovered, and what they need."""

from setuptools import setup

setup(
    name="querybridge",
    version="0.1.0",
    description="Learned queries read a frozen multimodal LLM and tell a diffusion decoder what to draw",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=["model", "data", "data.world", "sample", "train", "configs"],
    install_requires=[
        "torch>=2.11",
        "deepspeed>=0.19.8,<0.20",
        "transformers>=5.17,<6",
        "diffusers>=0.42,<0.43",
        "webdataset>=1.0.2,<1.1",
        "braceexpand>=0.1.7",
        "safetensors>=0.8",
        "sentencepiece>=0.2.2",
        "protobuf>=5",
        "numpy>=2",
        "pillow>=11",
        "pydantic>=2",
        "tyro>=1.0,<2",
        "rich>=14",
    ],
    extras_require={
        "test": [
            "pytest>=9",
            "hypothesis>=6",
            "ruff==0.17.*",
            "pyright>=1.1.400",
            "num2words>=0.5.14",
            "peft>=0.18",
            "matplotlib>=3.9",
            "scikit-image>=0.25",
        ],
        "lora": ["peft>=0.18"],
        "smolvlm": ["num2words>=0.5.14"],
        "fidelity": ["torch-fidelity>=0.4", "torchvision"],
        "decoders": ["simplejpeg>=1.9", "opencv-python-headless>=4.11"],
        "plots": ["matplotlib>=3.9"],
        "tensorboard": ["tensorboard>=2.20"],
        "wandb": ["wandb>=0.23"],
    },
)
