"""`appo compare`: methods x seeds from one starting policy on the embedded world, with the controls that say why.

`descriptions` and `perceiving` measure perception, `controls` and `methods` say what is compared, `cells` trains and
evaluates one method with one seed, `summaries`, `tables` and `plots` put them side by side, `compare` runs them all.
"""
