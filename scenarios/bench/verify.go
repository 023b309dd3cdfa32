package main

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"os"
	"slices"
	"time"

	"github.com/entente-mesh/entente/scenarios/process"
)

// referenceVerifyUS is what one verification takes on the machine that targets in
// microseconds were set for. On a slower one they grow by as much (line.limit).
const referenceVerifyUS = 44.5

// verifyLine is told whatever else is asked for: without it no time means anything.
const verifyLine = "verify_us"

// ofRun are the lines that each run of a suite has, whatever is measured in it.
func ofRun(minutes float64) []line {
	return []line{
		{verifyLine, "us", "CPU of one ECDSA verification on P-256 in this run: how fast the machine is", none, referenceVerifyUS},
		{"suite_min", "min", "the whole suite", minutes, none},
	}
}

// verify measures how fast the machine is just now.
func (b *bench) verify() error {
	us, err := b.verification()
	b.verifyUS = append(b.verifyUS, us)
	return err
}

// verification is the processor time of one ECDSA verification on P-256, in microseconds:
// what signing is made of.
func (b *bench) verification() (us float64, err error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return 0, err
	}
	digest := sha256.Sum256(nil)
	signature, err := ecdsa.SignASN1(rand.Reader, key, digest[:])
	if err != nil {
		return 0, err
	}
	before, err := process.CPUOf(os.Getpid())
	if err != nil {
		return 0, err
	}
	n := b.count(10_000, 1000)
	for range n {
		ecdsa.VerifyASN1(&key.PublicKey, digest[:], signature)
	}
	after, err := process.CPUOf(os.Getpid())
	return perItem(after-before, n), err
}

// reportRun reports the lines of the run, which began then.
func (b *bench) reportRun(began time.Time) error {
	if err := b.verify(); err != nil {
		return err
	}
	n := len(b.verifyUS)
	b.report(verifyLine, median(b.verifyUS), n, "median, from %.1f to %.1f; limits in microseconds hold at %.1f and scale above it",
		slices.Min(b.verifyUS), slices.Max(b.verifyUS), referenceVerifyUS)
	if len(b.only) == 0 && b.binary == "" {
		b.report("suite_min", time.Since(began).Minutes(), len(b.results), "without building")
	}
	return nil
}

func median(list []float64) float64 {
	sorted := slices.Sorted(slices.Values(list))
	middle := len(sorted) / 2
	if len(sorted)%2 == 0 {
		return (sorted[middle-1] + sorted[middle]) / 2
	}
	return sorted[middle]
}
