package workloadattest

import (
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// Before Linux 6.5 (its socket option is switched off here) nothing but the user counts at a unix socket in strict mode; with
// the option, or without strict, the process counts as well.
func TestStrictCountsOnlyTheUserBeforeLinux65(t *testing.T) {
	if _, err := peerOption(t); err != nil {
		t.Skipf("needs Linux 6.5: %v", err)
	}
	off := func(int) (int, error) { return -1, unix.ENOPROTOOPT }
	uid := "unix:uid:" + strconv.Itoa(os.Getuid())
	for name, test := range map[string]struct {
		options   []Option
		peerPidfd func(int) (int, error)
		process   bool   // selectors of the process count
		gap       string // what Gap says
	}{
		"Linux 6.5":         {nil, peerPidfd, true, ""},
		"Linux 6.5, strict": {[]Option{Strict}, peerPidfd, true, ""},
		"before":            {nil, off, true, "strict: true"},
		"before, strict":    {[]Option{Strict}, off, false, "only unix:uid"},
	} {
		t.Run(name, func(t *testing.T) {
			a := New(test.options...)
			a.peerPidfd = test.peerPidfd
			if gap := a.Gap(); (gap == "") != (test.gap == "") || !strings.Contains(gap, test.gap) {
				t.Errorf("it says %q", gap)
			}
			l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			o := start(t, "dial-unix", l.Addr().String())
			p, err := a.Unix(accept[*net.UnixConn](t, l))
			if err != nil {
				t.Fatal(err)
			}
			defer p.Close()
			if err := p.Satisfies([]string{uid}); err != nil {
				t.Errorf("the user: %v", err)
			}
			if err := p.Satisfies([]string{"unix:uid:4242"}); err == nil {
				t.Error("another user's")
			}
			for _, selectors := range [][]string{{uid, "unix:path:" + o.path}, {uid, "unix:sha256:" + digestOf(t, o.path)}, {uid, "unix:gid:" + strconv.Itoa(os.Getgid())}} {
				err := p.Satisfies(selectors)
				if (err == nil) != test.process || err != nil && !strings.Contains(err.Error(), "workloadAttestation.strict") {
					t.Errorf("%q: %v", selectors, err)
				}
			}
			release, err := a.Register("abcdefghijklmnop", p)
			if (err == nil) != test.process {
				t.Errorf("a run: %v", err)
			}
			if err == nil {
				release()
			}
		})
	}
}

// A process that was given the number of the one that connected, and is another user's, is not taken for it.
func TestRunsAs(t *testing.T) {
	h, err := hold(os.Getpid(), -1)
	if err != nil {
		t.Fatal(err)
	}
	defer h.close()
	if err := h.runsAs(uint32(os.Geteuid())); err != nil {
		t.Error(err)
	}
	if err := h.runsAs(uint32(os.Geteuid() + 1)); err == nil || !strings.Contains(err.Error(), "has ended") {
		t.Errorf("another user's: %v", err)
	}
}

func peerOption(t *testing.T) (int, error) {
	t.Helper()
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(pair[0])
	defer unix.Close(pair[1])
	fd, err := peerPidfd(pair[0])
	closeFD(max(fd, -1))
	return fd, err
}
