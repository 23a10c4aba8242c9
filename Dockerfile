# docker build --build-arg EXTRA=cuda -t llama_jax .     (tpu is the default)
FROM python:3.12-slim
ARG EXTRA=tpu
WORKDIR /llama_jax
COPY pyproject.toml README.md LICENSE ./
COPY llama_jax llama_jax
RUN pip install --no-cache-dir -e ".[$EXTRA]" gcsfs
COPY scripts scripts
CMD ["python", "scripts/doctor.py"]
