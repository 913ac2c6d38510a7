# Not built here: there was no container engine. It does what the README does, with the same Makefile.
#
#   docker build -t nemotron-jax .
#   docker run --rm -v "$PWD/runs:/project/runs" nemotron-jax make train
FROM python:3.11-slim

# bubblewrap: the better tier of the sandbox for code that a model wrote.
RUN apt-get update && apt-get install --yes --no-install-recommends make git bubblewrap \
    && rm -rf /var/lib/apt/lists/*
WORKDIR /project
COPY . .
RUN make .venv/.installed
ENV PATH=/project/.venv/bin:$PATH
CMD ["make", "help"]
