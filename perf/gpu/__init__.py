"""The runtime on one GPU: is it right, how fast is it, and does the cost model know it. `python -m perf.gpu`."""
