"""Does anything speak against believing a number?

| module      | looks at                                                      | when                     |
|-------------|---------------------------------------------------------------|--------------------------|
| `contract`  | a model: is it a function from pixels to logits at all?       | before any attack, `bench check` |
| `outcomes`  | what became of every image in every column                    | after the run, `bench audit`     |
| `probes`    | the model again, on a sample: further cheap attacks           | after the run            |

`bench.lint` looks at anybody's table. `run` puts them together when a run ends, `kept` shows what it found. `check` is the engine: every check is a function with a name, a threshold, a severity and a sentence of advice.
"""
