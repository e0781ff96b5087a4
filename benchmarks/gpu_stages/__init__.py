"""The stages of ``make gpu``: functions ``stage(log, rehearse)``, in the order in which `benchmarks.gpu` names them."""
