"""Packaging: this folder is the package `betarank`, so `betarank.model` is the folder model/ (see README.md)."""

import pathlib

from setuptools import find_packages, setup

# Lower bounds are what the tests ran with; jax 0.10 is the newest for Python 3.11, 0.12 for 3.12.
CORE = [
    'jax>=0.10.1,<0.13',
    'flax>=0.12.1',
    'optax>=0.2.8',
    'orbax-checkpoint>=0.12.5',
    'ml-collections>=1.1',
    'numpy>=2.0',
    'scipy>=1.14',
    'absl-py>=2.1',
    'etils[epath]>=1.12',
    # Data: TFDS reads ArrayRecord without TensorFlow, but forgets to require importlib_resources.
    'grain>=0.2.15',
    'array-record>=0.8.3',
    'tensorflow-datasets>=4.9.10',
    'importlib_resources>=6.0',
    'sentencepiece>=0.2.0',
    'tokenizers>=0.21',  # tokenizer.json
    'pyarrow>=21.0',
    'fsspec>=2024.6',
    'reasoning-gym>=0.1.23',
    'math-verify>=0.9.0',
    # What one sees while it runs.
    'rich>=13.7',
    'tensorboardX>=2.6.2',
    'matplotlib>=3.9',
]

EXTRAS = {
    'tpu': ['jax[tpu]>=0.10.1,<0.13', 'gcsfs>=2024.6'],
    'gpu': ['jax[cuda13]>=0.10.1,<0.13'],
    'gcs': ['gcsfs>=2024.6'],
    'hf': ['safetensors>=0.7'],  # betarank hf import
    'wandb': ['wandb>=0.19'],  # config.log.wandb
    'lm_eval': ['lm_eval>=0.4.13'],  # betarank eval harness
    'dev': ['safetensors>=0.7', 'gcsfs>=2024.6', 'pytest>=8.3', 'pytest-xdist>=3.8', 'hypothesis>=6.112', 'ruff>=0.8'],
}

FOLDERS = ('configs', 'objectives', 'model', 'data', 'tasks', 'runtime', 'train', 'rl', 'eval', 'launch')

setup(
    name='betarank',
    version='0.1.0',
    description='Pre-train language models with a reward-shaped next-token objective, and measure what it does to RL.',
    long_description=pathlib.Path(__file__).with_name('README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    python_requires='>=3.11',
    package_dir={'betarank': '.'},
    packages=['betarank', *(f'betarank.{p}' for top in FOLDERS for p in find_packages(include=[top, f'{top}.*']))],
    package_data={'betarank.launch': ['*.sh', '*.txt', 'lock/*', 'examples/*'],
                  'betarank.eval.explore': ['assets/*']},
    entry_points={'console_scripts': ['betarank = betarank.__main__:main']},
    install_requires=CORE,
    extras_require=EXTRAS,
)
