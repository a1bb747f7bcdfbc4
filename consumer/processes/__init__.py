"""Several members of the group on one host, under one supervisor (``runtime.processes``).

::

    supervisor        owns the processes and the admin port; carries out what `decisions` says
      ├─ channel ──▶ member 1     the service as always, told by its supervisor when to stop, asked what it is doing
      ├─ channel ──▶ member 2
      └─ …

* :mod:`~consumer.processes.decisions`: what to start, stop and kill, and when all of it ends (pure).
* :mod:`~consumer.processes.merge`: one state and one set of metrics out of many (pure).

With one process there is no supervisor, and nothing of this is imported.
"""
