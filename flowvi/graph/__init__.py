"""A function of tensors as one flat list of tensor operations, gradients and all: no modules, no handlers, no tape.

`record` runs the function and writes down what it did (torch's make_fx), `tidy` leaves out what does nothing and puts
small products of one matrix side by side (`join`), and `emit` makes one Python function of the rest, its calls bound to
their shapes (`bound`). What is gained is what Python and autograd cost, which for small networks is most of a step; and
matrix products go to the quicker library (`flowvi.kernels.linear`).

The recording is of one run: Python code that would do something else later is not run again. So what takes numbers out
of torch or changes from call to call is refused, and whoever uses a recording compares it with the function itself
(`flowvi.fit.gradient`).
"""

from flowvi.graph.emit import emit
from flowvi.graph.products import Opened, Product, open_products
from flowvi.graph.record import Refused, record
from flowvi.graph.tidy import keep, tidy

__all__ = ["Opened", "Product", "Refused", "emit", "keep", "open_products", "record", "tidy"]
