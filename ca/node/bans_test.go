package node

import (
	"bytes"
	"strings"
	"testing"
	"time"
)

func exampleBan(name string) ban {
	return ban{
		Kind: isolated, Cluster: "00", Agent: name, Datacenter: "dc1", KeyID: strings.Repeat("a", 64), Generation: 7,
		Revision: 9, Time: time.Unix(1, 0).UTC(), Who: "somebody", Reason: "INC-881",
	}
}

// Only whole lines count; one that was altered is noticed.
func TestReadBans(t *testing.T) {
	first, err := exampleBan("h1").line()
	if err != nil {
		t.Fatal(err)
	}
	second, _ := exampleBan("h2").line()
	both := append(bytes.Clone(first), second...)
	for cut := range len(both) + 1 {
		var got []ban
		size, err := readBans(bytes.NewReader(both[:cut]), func(b ban) { got = append(got, b) })
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
		if _, err := readBans(bytes.NewReader(altered), func(ban) {}); err == nil {
			t.Fatalf("byte %d was altered, and nobody noticed", i)
		}
	}
	long := append(bytes.Repeat([]byte("x"), maxBanLine+1), '\n')
	if _, err := readBans(bytes.NewReader(long), func(ban) {}); err == nil {
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
		line, _ := b.line()
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
	line, _ := exampleBan("h1").line()
	f.Add(line)
	f.Add([]byte("00000000 {}\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		readBans(bytes.NewReader(data), func(b ban) {
			again, err := b.line()
			if err != nil {
				t.Fatal(err)
			}
			if same, err := parseBan(bytes.TrimSuffix(again, []byte("\n"))); err != nil || same != b {
				t.Fatalf("%+v became %+v, %v", b, same, err)
			}
		})
	})
}
