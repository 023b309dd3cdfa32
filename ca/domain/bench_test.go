package domain

import (
	"bytes"
	"fmt"
	"io"
	"runtime"
	"testing"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
)

// large is a state with n services, 100 of them on each host.
func large(b *testing.B, n int) (*world, uint64) {
	w := &world{t: b, s: New(), seeds: map[string][]byte{}}
	w.s.Apply(w.next(), w.initCommand())
	var list []*statev1.Object
	for i := range n {
		list = append(list, service(fmt.Sprintf("s%d", i), fmt.Sprintf("h%d", i/100)))
	}
	before := heap()
	if out := w.s.Apply(w.next(), objects(list...)); out.Refused != nil {
		b.Fatal(out.Refused)
	}
	list = nil
	return w, heap() - before
}

func heap() uint64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

const many = 2_000

func BenchmarkSnapshot(b *testing.B) {
	w, bytes := large(b, many)
	b.ReportAllocs()
	for b.Loop() {
		w.s.Snapshot()
	}
	b.ReportMetric(float64(bytes)/many, "heap-B/service")
}

func BenchmarkWriteTo(b *testing.B) {
	w, _ := large(b, many)
	n := w.s.Snapshot()
	for b.Loop() {
		size, err := n.WriteTo(io.Discard)
		if err != nil {
			b.Fatal(err)
		}
		b.SetBytes(size)
	}
}

func BenchmarkRestore(b *testing.B) {
	w, _ := large(b, many)
	var stream bytes.Buffer
	w.s.Snapshot().WriteTo(&stream)
	b.SetBytes(int64(stream.Len()))
	for b.Loop() {
		if _, err := Restore(bytes.NewReader(stream.Bytes())); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkApplyObjects changes one service among many.
func BenchmarkApplyObjects(b *testing.B) {
	w, _ := large(b, many)
	for i := 0; b.Loop(); i++ {
		o := service("s7", "h0")
		o.Source = fmt.Sprint(i)
		if out := w.s.Apply(w.next(), objects(o)); out.Refused != nil {
			b.Fatal(out.Refused)
		}
	}
}

func BenchmarkTick(b *testing.B) {
	w := newWorld(b)
	cmd := tick(epochTime, epochTime, epochTime)
	b.ReportAllocs()
	for b.Loop() {
		w.s.Apply(w.next(), cmd)
	}
}

func BenchmarkEntriesOnHost(b *testing.B) {
	w, _ := large(b, many)
	for b.Loop() {
		if len(w.s.EntriesOnHost("h7")) != 100 {
			b.Fatal("entries are missing")
		}
	}
}
