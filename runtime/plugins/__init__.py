"""What launches the kernels that a bundle carries: their description, the launcher, and TensorRT's plugins.

`kernel.py` reads cubins and their descriptions; `launch.py` launches them through cuda-python and knows nothing of
TensorRT; `tensorrt.py` puts both into IPluginV3 classes for `tensorrt` or `tensorrt_rtx`, whichever is given.
"""
