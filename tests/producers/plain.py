"""A producer that knows nothing of the bridge: Celery, a broker URL, task names. Prints JSON."""

import json
import os
import sys

from celery import Celery, chain, group

app = Celery(broker=os.environ["CELERY_BROKER_URL"], backend=os.environ["CELERY_RESULT_BACKEND"])


def main():
    add, double = app.signature("shop.add"), app.signature("shop.double")
    sums = group(add.clone((n, n)) for n in range(20)).apply_async().get(timeout=60)
    chained = chain(double.clone((1,)), add.clone((5,)), double).apply_async().get(timeout=60)
    loaded = sorted(name for name in sys.modules if name.split(".")[0] in ("bridge", "actors", "ray", "cupy"))
    print(json.dumps({"sums": sums, "chained": chained, "loaded": loaded}))


if __name__ == "__main__":
    main()
