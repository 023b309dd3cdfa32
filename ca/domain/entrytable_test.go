package domain

import (
	"bytes"
	"fmt"
	"maps"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	"pgregory.net/rapid"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca/selector"
)

// Every field of an entry comes back: one that is added to the API and forgotten in
// decodeEntry would be lost.
func TestEntryEncodingRoundTrips(t *testing.T) {
	e := &statev1.Entry{}
	eachField(e.ProtoReflect(), "", func(path string) {
		enc := encoder{}
		enc.record(e)
		back, err := decodeEntry(enc.b)
		if err != nil || !proto.Equal(e, back) {
			t.Errorf("%s: %v is %v, %v", path, e, back, err)
		}
		if _, err := viewEntry(enc.b, true); err != nil {
			t.Errorf("%s: %v", path, err)
		}
		without := encoder{} // node selectors stand at the end, and only if there are some
		without.record(&statev1.Entry{})
		for n := range enc.b {
			if _, err := viewEntry(enc.b[:n], true); err == nil && !(len(e.GetNodeSelectors()) > 0 && n == len(without.b)) {
				t.Errorf("%s: %d of %d bytes are read", path, n, len(enc.b))
			}
		}
		if _, err := viewEntry(append(enc.b, 0), true); err == nil || !strings.Contains(err.Error(), "upgrade") {
			t.Errorf("%s: a field that is not known: %v", path, err)
		}
	})
}

func FuzzEntryEncoding(f *testing.F) {
	enc := encoder{}
	enc.record(&statev1.Entry{Id: "entry/a", Path: "/a", Hosts: []string{"h1", "h2"}, Selectors: []string{"unix:uid:1"}, X509SvidSeconds: 300, Hint: "h"})
	f.Add(enc.b)
	f.Fuzz(func(t *testing.T, raw []byte) {
		e, err := decodeEntry(raw)
		if _, viewed := viewEntry(raw, false); (viewed == nil) != (err == nil) {
			t.Fatalf("decoded: %v, viewed: %v", err, viewed)
		}
		if err != nil {
			return
		}
		again := encoder{}
		again.record(e)
		if !bytes.Equal(again.b, raw) {
			t.Fatalf("%x is written as %x", raw, again.b)
		}
	})
}

// The table does what a map would, through slabs that are given back and blocks that are
// split; what was taken of it stays as it was.
func TestEntryTableIsAMap(t *testing.T) {
	most := 4000
	if testing.Short() {
		most = 600
	}
	rapid.Check(t, func(rt *rapid.T) {
		var table entryTable
		var sum setHash
		model := map[string]*statev1.Entry{}
		var before []*statev1.Entry
		var places entryPlaces
		steps := rapid.IntRange(1, most).Draw(rt, "steps")
		// Few names, long hints: much dies. Many names: blocks are split.
		names, hint := rapid.SampledFrom([]int{3, 400, 3000}).Draw(rt, "names"), rapid.SampledFrom([]int{0, 2000, slabSize}).Draw(rt, "hint")
		if hint == slabSize {
			steps = min(steps, 10)
		}
		next := rapid.Uint64().Draw(rt, "seed")
		random := func(n int) int { // drawing each would take long
			next = next*6364136223846793005 + 1442695040888963407
			return int(next>>33) % n
		}
		for i := range steps {
			id := fmt.Sprintf("entry/n%d", random(names))
			if random(4) == 0 {
				had := model[id] != nil
				if table.remove(id, &sum) != had {
					rt.Fatalf("removed %s: not %v", id, had)
				}
				delete(model, id)
				continue
			}
			e := &statev1.Entry{
				Id: id, Path: "/p", Hosts: []string{fmt.Sprintf("h%d", random(3)), "h9"}[:1+random(2)],
				X509SvidSeconds: uint32(random(3)), Revision: uint64(i), Hint: strings.Repeat("x", hint),
				Selectors: [][]string{{"unix:uid:7"}, {"unix:sha256:7"}, {"unix:sha256:7", "systemd:unit:a.service"}}[random(3)],
			}
			table.put(e, &sum)
			model[id] = e
			if i == steps/2 {
				places, before = table.places(), slices.Collect(maps.Values(model))
			}
		}
		equal := func(a, b *statev1.Entry) bool { return proto.Equal(a, b) }
		byID := func(a, b *statev1.Entry) int { return strings.Compare(a.GetId(), b.GetId()) }
		all := slices.SortedFunc(maps.Values(model), byID)
		if !slices.EqualFunc(slices.Collect(table.from("")), all, equal) || table.len() != len(all) {
			rt.Fatal("it holds something else")
		}
		weak := slices.DeleteFunc(slices.Clone(all), func(e *statev1.Entry) bool { return selector.CheckAnchored(e.GetSelectors()) == nil })
		if table.weak != len(weak) {
			rt.Fatalf("%d entries count as weak, %d are", table.weak, len(weak))
		}
		if len(all) > 0 {
			n := random(len(all))
			if !slices.EqualFunc(slices.Collect(table.from(all[n].GetId())), all[n+1:], equal) {
				rt.Fatal("what comes after an entry is something else")
			}
		}
		var want setHash
		lives := map[uint32]int{}
		for _, e := range all {
			want.add(hashRecord(e))
			lives[e.GetX509SvidSeconds()]++
			if got, ok := table.get(e.GetId()); !ok || !equal(got, e) {
				rt.Fatalf("%v is %v", e, got)
			}
		}
		if sum != want || !maps.Equal(lives, table.lives) {
			rt.Fatal("checksum or lives differ")
		}
		for _, host := range []string{"h0", "h1", "h2", "h9", "h7"} {
			on := slices.DeleteFunc(slices.Clone(all), func(e *statev1.Entry) bool { return !slices.Contains(e.GetHosts(), host) })
			if !slices.EqualFunc(table.onHostOf(host), on, equal) || table.countOnHost(host) != len(on) {
				rt.Fatalf("other entries on %s", host)
			}
		}
		dead, size := 0, 0
		for i, slab := range table.slabs {
			size += len(slab)
			dead += table.dead[i]
		}
		if dead > size/2+3*(slabSize+hint) {
			rt.Fatalf("%d of %d bytes are dead", dead, size)
		}
		slices.SortFunc(before, byID)
		for i, place := range places.places {
			if !equal(decodeStored(rawEntry(places.slabs, place)), before[i]) {
				rt.Fatal("what was taken of it changed")
			}
		}
	})
}

// manyEntries is a state with n entries as a domain would have them, 100 on each host.
func manyEntries(t testing.TB, n int) *world {
	w := &world{t: t, s: New(), seeds: map[string][]byte{}}
	w.s.Apply(w.next(), w.initCommand())
	changes := make([]*statev1.EntryChange, 0, 250)
	for i := range n {
		changes = append(changes, create(realistic(i)))
		if len(changes) == cap(changes) || i == n-1 {
			if out := w.s.Apply(w.next(), entries(changes...)); out.Refused != nil {
				t.Fatal(out.Refused)
			}
			changes = changes[:0]
		}
	}
	return w
}

// realistic is an entry of the size that entries have: a SPIFFE path of 40 bytes, two
// selectors, a life, some with a DNS name and a hint.
func realistic(i int) *statev1.Entry {
	e := entry(fmt.Sprintf("w-%07d", i), fmt.Sprintf("/region-%d/payments/batch/worker-%09d", i%4, i), fmt.Sprintf("host-%05d", i/100))
	e.Selectors = []string{fmt.Sprintf("unix:uid:%d", 10_000+i%50_000), fmt.Sprintf("unix:path:/opt/payments/bin/worker-%d", i%1000)}
	e.X509SvidSeconds = 3600
	if i%3 == 0 {
		e.DnsNames = []string{fmt.Sprintf("worker-%d.payments.internal", i)}
	}
	if i%5 == 0 {
		e.Hint = "nightly settlement"
	}
	return e
}

// maxEntryBytes bounds what an entry may cost: it itself has about 190 bytes.
const maxEntryBytes = 260

func TestEntriesAreCompact(t *testing.T) {
	if testing.Short() {
		t.Skip("what the race detector adds is no cost of entries")
	}
	const n = 50_000
	before := heap()
	w := manyEntries(t, n)
	per := float64(heap()-before) / n
	t.Logf("%.0f bytes per entry", per)
	if per > maxEntryBytes {
		t.Errorf("an entry costs %.0f bytes of heap, over %d", per, maxEntryBytes)
	}
	// What was changed over and over costs no more.
	for i := range n / 2 {
		e := realistic(i % 500)
		e.Hint = fmt.Sprint(i)
		w.s.Apply(w.next(), entries(update(e, 0)))
	}
	if per := float64(heap()-before) / n; per > maxEntryBytes {
		t.Errorf("after many changes an entry costs %.0f bytes of heap, over %d", per, maxEntryBytes)
	}
	runtime.KeepAlive(w)
}

// BenchmarkEntries builds a million entries, writes them and reads them back.
func BenchmarkEntries(b *testing.B) {
	const n = 1_000_000
	for b.Loop() {
		before := heap()
		w := manyEntries(b, n)
		b.ReportMetric(float64(heap()-before)/n, "heap-B/entry")
		b.ReportMetric(n/b.Elapsed().Seconds(), "entries/s")
		var stream bytes.Buffer
		if _, err := w.s.Snapshot().WriteTo(&stream); err != nil {
			b.Fatal(err)
		}
		w = nil
		before = heap()
		start := time.Now()
		s, err := Restore(bytes.NewReader(stream.Bytes()))
		if err != nil {
			b.Fatal(err)
		}
		b.ReportMetric(time.Since(start).Seconds(), "restore-s")
		b.ReportMetric(float64(heap()-before)/n, "restored-B/entry")
		runtime.KeepAlive(stream)
		runtime.KeepAlive(s)
	}
}
