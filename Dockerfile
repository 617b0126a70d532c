# docker build -t haste . && docker run --gpus all --ipc=host -it -v /path/to/data:/data -v /path/to/exps:/haste/exps haste
# PyPI's torch for Linux brings CUDA's libraries; the host needs NVIDIA's driver and container toolkit.
FROM python:3.11-slim
RUN apt-get update && apt-get install -y --no-install-recommends g++ git make && rm -rf /var/lib/apt/lists/*
WORKDIR /haste
COPY requirements.txt constraints.txt ./
RUN pip install --no-cache-dir -r requirements.txt -c constraints.txt
COPY . .
RUN pip install --no-cache-dir --no-deps -e .
CMD ["bash"]
