package main

import (
	"context"
	"fmt"
	"os"
	"time"

	"github.com/entente-mesh/entente/scenarios/load"
	"github.com/entente-mesh/entente/scenarios/process"
)

var linksSuite = suite{
	name:  "links",
	short: "Measure what scenarios are made of: the recorder of a load",
	lines: append([]line{
		{"recorder_us", "us", "CPU of recording one request, 5,000 a second, one second in 20 fails", 3, none},
	}, ofRun(1)...),
	groups: []group{
		{[]string{"recorder_us"}, measureRecorder},
	},
}

// measureRecorder records a load as the runner does, without the load: a million
// requests, several times, since processor time is known to 10 ms only.
func measureRecorder(_ context.Context, b *bench) error {
	start := time.Now()
	samples := recorded(start, 1_000_000)
	rounds := b.count(5, 1)
	var recorder *load.Recorder
	before, err := process.CPUOf(os.Getpid())
	if err != nil {
		return err
	}
	for range rounds {
		recorder = load.NewRecorder(start)
		for _, s := range samples {
			recorder.Add(s)
		}
	}
	after, err := process.CPUOf(os.Getpid())
	if err != nil {
		return err
	}
	n := rounds * len(samples)
	records, dropped := recorder.Records()
	b.report("recorder_us", perItem(after-before, n), n, "%d seconds; %d whole records kept around failures, %d more only counted", recorder.Seconds(), len(records), dropped)
	return nil
}

// recorded are requests at 5,000 a second, of which every 20th second fails.
func recorded(start time.Time, n int) []load.Sample {
	const rate, failing = 5000, 20
	samples := make([]load.Sample, n)
	for i := range samples {
		scheduled := start.Add(time.Duration(i) * time.Second / rate)
		s := load.Sample{
			Scheduled: scheduled, Done: scheduled.Add(time.Duration(i%1000) * 40 * time.Microsecond),
			OK: i/rate%failing != failing-1, Attempts: 1, RequestID: fmt.Sprintf("request-%d", i),
		}
		if s.OK {
			s.ServedBy = []string{"dc1"}
		} else {
			s.Error = "connection refused"
		}
		samples[i] = s
	}
	return samples
}
