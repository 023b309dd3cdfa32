package workloadattest

import (
	"encoding/binary"
	"errors"
	"net/netip"
	"os"
	"slices"
	"testing"
)

func TestParseStartTime(t *testing.T) {
	own, err := os.ReadFile("/proc/self/stat")
	if err != nil {
		t.Fatal(err)
	}
	if start, err := parseStartTime(own); err != nil || start == 0 {
		t.Errorf("own: %d, %v", start, err)
	}
	const rest = " S 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 4711 23"
	for _, name := range []string{"(sh)", "(a b)", "(x) S 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 666)", "(\n)", "()"} {
		if start, err := parseStartTime([]byte("1 " + name + rest)); err != nil || start != 4711 {
			t.Errorf("%q: %d, %v", name, start, err)
		}
	}
	for _, bad := range []string{"", "1", "1 (sh", "1 (sh) S 4", "1 (sh) S 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 x"} {
		if _, err := parseStartTime([]byte(bad)); err == nil {
			t.Errorf("%q was read", bad)
		}
	}
}

func TestParseStatus(t *testing.T) {
	own, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	is, err := parseStatus(own)
	if err != nil || int(is.uid) != os.Geteuid() || int(is.gid) != os.Getegid() {
		t.Errorf("own: %v %v", is, err)
	}
	// The effective one counts; a command's name cannot bring in a line.
	is, err = parseStatus([]byte("Name:\tUid:\\n\nUid:\t1\t2\t3\t4\nGid:\t5\t6\t7\t8\nGroups:\t4 27 1000 \n"))
	if err != nil || is.uid != 2 || is.gid != 6 || !slices.Equal(is.groups, []uint32{4, 27, 1000}) {
		t.Errorf("effective: %v %v", is, err)
	}
	for _, bad := range []string{"", "Uid:\t1\t2\t3\t4\n", "Uid:\t1\t2\nGid:\t5\t6\t7\t8\nGroups:\n", "Uid:\t1\t-1\t3\t4\nGid:\t5\t6\t7\t8\nGroups:\n",
		"Uid:\t1\t4294967296\t3\t4\nGid:\t5\t6\t7\t8\nGroups:\n", "Uid:\t1\t2\t3\t4\nGid:\t5\t6\t7\t8\n", "Uid:\t1\t2\t3\t4\nGid:\t5\t6\t7\t8\nGroups:\tx\n"} {
		if _, err := parseStatus([]byte(bad)); err == nil {
			t.Errorf("%q was read", bad)
		}
	}
}

// diagAnswer is what the kernel says of an IPv4 socket.
func diagAnswer(state byte, src, dst netip.AddrPort, uid, inode uint32) []byte {
	b := make([]byte, headerSize+answerSize)
	binary.NativeEndian.PutUint32(b, uint32(len(b)))
	binary.NativeEndian.PutUint16(b[4:], sockDiagByFamily)
	m := b[headerSize:]
	m[0], m[1] = 2, state
	binary.BigEndian.PutUint16(m[4:], src.Port())
	binary.BigEndian.PutUint16(m[6:], dst.Port())
	copy(m[8:], src.Addr().AsSlice())
	copy(m[24:], dst.Addr().AsSlice())
	binary.NativeEndian.PutUint32(m[4+sockIDSize+12:], uid)
	binary.NativeEndian.PutUint32(m[4+sockIDSize+16:], inode)
	return b
}

var (
	source      = netip.MustParseAddrPort("127.0.0.1:40000")
	destination = netip.MustParseAddrPort("127.0.0.1:19001")
)

func TestParseDiag(t *testing.T) {
	good := diagAnswer(1, source, destination, 1000, 77)
	got, err := parseDiag(good)
	if want := (socket{1, source, destination, 1000, 77}); err != nil || got != want {
		t.Errorf("got %v %v, want %v", got, err, want)
	}
	mapped := slices.Clone(good)
	mapped[headerSize] = 10
	for _, at := range []int{8, 24} {
		address := netip.MustParseAddr("::ffff:127.0.0.1").As16()
		copy(mapped[headerSize+at:], address[:])
	}
	if got, err := parseDiag(mapped); err != nil || got.is(source, destination) != nil {
		t.Errorf("an IPv6 socket with IPv4 addresses: %v %v", got, err)
	}

	for length := range good {
		if _, err := parseDiag(good[:length]); err == nil {
			t.Errorf("an answer of %d bytes was read", length)
		}
	}
	missing := make([]byte, headerSize+4)
	binary.NativeEndian.PutUint32(missing, uint32(len(missing)))
	binary.NativeEndian.PutUint16(missing[4:], 2)
	errno := int32(-2)
	binary.NativeEndian.PutUint32(missing[headerSize:], uint32(errno))
	if _, err := parseDiag(missing); !errors.Is(err, errNoSocket) {
		t.Errorf("ENOENT: %v", err)
	}
}

// Only the answer to the question counts.
func TestDiagAnswerIsTheQuestions(t *testing.T) {
	none := netip.AddrPort{}
	anyAddress := netip.MustParseAddrPort("0.0.0.0:40000")
	tests := []struct {
		name     string
		s        socket
		src, dst netip.AddrPort
		ok       bool
	}{
		{"connection", socket{state: 1, src: source, dst: destination}, source, destination, true},
		{"listener", socket{state: tcpListen, src: source}, source, none, true},
		{"listener on every address", socket{state: tcpListen, src: anyAddress}, source, none, true},
		{"other end", socket{state: 1, src: destination, dst: source}, source, destination, false},
		{"other connection of the port", socket{state: 1, src: source, dst: netip.MustParseAddrPort("127.0.0.1:2")}, source, destination, false},
		{"connection instead of a listener", socket{state: 1, src: source, dst: destination}, source, none, false},
		{"connection from every address", socket{state: 1, src: anyAddress, dst: destination}, source, destination, false},
	}
	for _, test := range tests {
		if err := test.s.is(test.src, test.dst); (err == nil) != test.ok {
			t.Errorf("%s: %v", test.name, err)
		}
	}
}

func FuzzParseDiag(f *testing.F) {
	f.Add(diagAnswer(1, source, destination, 1000, 77))
	f.Add(diagAnswer(tcpListen, source, destination, 0, 0)[:headerSize+3])
	f.Fuzz(func(t *testing.T, b []byte) {
		s, err := parseDiag(b)
		if err == nil && (!s.src.IsValid() || !s.dst.IsValid()) {
			t.Errorf("read %v", s)
		}
	})
}

func FuzzParseProc(f *testing.F) {
	f.Add([]byte("1 (sh) S 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 4711 23"))
	f.Add([]byte("Uid:\t1\t2\t3\t4\nGid:\t5\t6\t7\t8\n"))
	f.Fuzz(func(t *testing.T, b []byte) {
		parseStartTime(b)
		parseStatus(b)
	})
}
