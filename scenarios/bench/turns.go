package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
)

// turns say how this build compares with another one, measured in turn with it, so that
// what the machine does meanwhile falls on both. The result's value is the median over
// the rounds.
type turns struct {
	Other  *float64  `json:"other"`  // the other build's; null: it could not be measured
	Ratio  *float64  `json:"ratio"`  // of this build to the other: median over the rounds
	Ratios []float64 `json:"ratios"` // of each round
}

// build is one of two that are measured in turn.
type build struct {
	exe    string
	values map[string][]float64 // by line, one for each round
	failed map[string]string    // why a line could not be measured: it is not tried again
	n      map[string]int       // items that were measured
}

// inTurn measures the lines of a group of both builds, round after round. Who begins
// changes with the round.
func (b *bench) inTurn(ctx context.Context, g group) error {
	var both [2]*build
	for i, exe := range []string{b.exe, b.binary} {
		both[i] = &build{exe, map[string][]float64{}, map[string]string{}, map[string]int{}}
	}
	var failures []error
	for round := range b.rounds {
		for _, i := range []int{round % 2, 1 - round%2} {
			err := b.turn(ctx, g, both[i])
			if ctx.Err() != nil {
				return ctx.Err()
			}
			if i == 0 { // an older build need not have all that is measured
				failures = append(failures, err)
			}
		}
	}
	for _, name := range g.lines {
		if b.wants(name) {
			l, _ := b.suite.line(name)
			b.take(l, compared(l, both[0], both[1]))
		}
	}
	return errors.Join(failures...)
}

// turn measures one build once.
func (b *bench) turn(ctx context.Context, g group, of *build) error {
	left := slices.DeleteFunc(slices.Clone(g.lines), func(name string) bool { return of.failed[name] != "" || !b.wants(name) })
	if len(left) == 0 {
		return nil
	}
	b.say("in turn: %s", of.exe)
	own, options := *b, *b.options
	options.only, options.out = left, io.Discard
	own.options, own.exe, own.results = &options, of.exe, nil
	err := own.measureGroup(ctx, g)
	b.domains, b.verifyUS = own.domains, own.verifyUS
	for _, r := range own.results {
		if r.Value == nil {
			of.failed[r.Name] = r.Note
			continue
		}
		of.values[r.Name] = append(of.values[r.Name], *r.Value)
		of.n[r.Name] += r.N
	}
	return err
}

// compared is the result of a line that both builds were measured for.
func compared(l line, this, other *build) result {
	r := result{Name: l.name, Unit: l.unit, N: this.n[l.name], Turns: &turns{}}
	ours, theirs := this.values[l.name], other.values[l.name]
	for i := range min(len(ours), len(theirs)) {
		if theirs[i] != 0 {
			r.Turns.Ratios = append(r.Turns.Ratios, ours[i]/theirs[i])
		}
	}
	r.Turns.Ratio = middle(r.Turns.Ratios)
	if this.failed[l.name] == "" {
		r.Value = middle(ours)
	}
	if other.failed[l.name] == "" {
		r.Turns.Other = middle(theirs)
	}
	r.Note = fmt.Sprintf("this build %s; the other %s", spread(ours, this.failed[l.name]), spread(theirs, other.failed[l.name]))
	return r
}

// middle is the median of what there is.
func middle(list []float64) *float64 {
	if len(list) == 0 {
		return nil
	}
	m := rounded(median(list))
	return &m
}

// spread is how far the rounds differ, and why there are no more of them.
func spread(list []float64, failed string) string {
	if failed != "" {
		return failed
	}
	return fmt.Sprintf("from %s to %s", figure(slices.Min(list)), figure(slices.Max(list)))
}
