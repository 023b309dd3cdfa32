package node

import (
	"bytes"
	"strings"
	"testing"
	"time"

	"github.com/entente-mesh/entente/ca/local"
)

func exampleBan(name string) local.Ban {
	return local.Ban{
		Kind: local.Isolated, Cluster: "00", Agent: name, Datacenter: "dc1", KeyID: strings.Repeat("a", 64), Generation: 7,
		Revision: 9, Time: time.Unix(1, 0).UTC(), Who: "somebody", Reason: "INC-881",
	}
}

// Only whole lines count; one that was altered is noticed.
func TestReadBans(t *testing.T) {
	first, err := journalLine(exampleBan("h1"))
	if err != nil {
		t.Fatal(err)
	}
	second, _ := journalLine(exampleBan("h2"))
	both := append(bytes.Clone(first), second...)
	for cut := range len(both) + 1 {
		var got []local.Ban
		size, err := readBans(bytes.NewReader(both[:cut]), func(b local.Ban) { got = append(got, b) })
		want := 0
		switch {
		case cut == len(both):
			want = 2
		case cut >= len(first):
			want = 1
		}
		if err != nil || len(got) != want || want > 0 && got[0] != exampleBan("h1") || size != int64(want*len(first)) {
			t.Fatalf("the first %d bytes: %v, size %d, %v", cut, got, size, err)
		}
	}
	for i := range first {
		altered := bytes.Clone(both)
		altered[i] ^= 4
		if _, err := readBans(bytes.NewReader(altered), func(local.Ban) {}); err == nil {
			t.Fatalf("byte %d was altered, and nobody noticed", i)
		}
	}
	long := append(bytes.Repeat([]byte("x"), maxBanLine+1), '\n')
	if _, err := readBans(bytes.NewReader(long), func(local.Ban) {}); err == nil {
		t.Error("a line without end was read")
	}
}

// The memory is written anew when most of it is superseded, and holds the same.
func TestBansAreCompacted(t *testing.T) {
	dir := t.TempDir()
	var text []byte
	for i := range 1100 {
		b := exampleBan("h1")
		b.Revision = uint64(i)
		line, _ := journalLine(b)
		text = append(text, line...)
	}
	b, err := openBans(dir, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := b.append(text); err != nil {
		t.Fatal(err)
	}
	b.Close()
	for range 2 {
		if b, err = openBans(dir, nil); err != nil {
			t.Fatal(err)
		}
		if err := b.add(exampleBan("h2")); err != nil {
			t.Fatal(err)
		}
		list, _ := b.all()
		if len(list) != 2 || list[0].Revision != 1099 || b.size > 4<<10 {
			t.Errorf("%v, %d bytes", list, b.size)
		}
		b.Close()
	}
}

func FuzzReadBans(f *testing.F) {
	line, _ := journalLine(exampleBan("h1"))
	f.Add(line)
	f.Add([]byte("00000000 {}\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		readBans(bytes.NewReader(data), func(b local.Ban) {
			again, err := journalLine(b)
			if err != nil {
				t.Fatal(err)
			}
			if same, err := parseBan(bytes.TrimSuffix(again, []byte("\n"))); err != nil || same != b {
				t.Fatalf("%+v became %+v, %v", b, same, err)
			}
		})
	})
}
