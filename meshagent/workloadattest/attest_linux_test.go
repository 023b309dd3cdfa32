package workloadattest

import (
	"bufio"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/entente-mesh/entente/ca/selector"
)

// The test binary is also the other process: ENTENTE_TEST_CHILD says what it does.
func TestMain(m *testing.M) {
	if what := os.Getenv("ENTENTE_TEST_CHILD"); what != "" {
		if err := child(what, os.Getenv("ENTENTE_TEST_ADDRESS")); err != nil {
			fmt.Println("child:", err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// child says "ready" and then does what its standard input's end lets it end.
func child(what, address string) error {
	switch what {
	case "dial-unix", "dial-tcp":
		conn, err := net.Dial(strings.TrimPrefix(what, "dial-"), address)
		if err != nil {
			return err
		}
		defer conn.Close()
	case "listen":
		l, err := net.Listen("tcp", address)
		if err != nil {
			return err
		}
		defer l.Close()
		fmt.Println(l.Addr())
	case "attest": // as a user of its own, whoever dials
		l, err := net.Listen("tcp", address)
		if err != nil {
			return err
		}
		defer l.Close()
		fmt.Println(l.Addr())
		conn, err := l.Accept()
		if err != nil {
			return err
		}
		process, err := New().TCP(conn)
		if err != nil {
			return err
		}
		fmt.Println("uid:", process.Satisfies([]string{"unix:uid:0"}))
		fmt.Println("path:", process.Satisfies([]string{"unix:uid:0", "unix:path:/bin/sh"}))
		return nil
	}
	fmt.Println("ready")
	io.Copy(io.Discard, os.Stdin)
	return nil
}

type other struct {
	*exec.Cmd
	stdin io.Closer
	out   *bufio.Reader
	path  string
}

// start runs the test binary, hard-linked to a path of its own, as another process.
func start(t *testing.T, what, address string, attr ...*syscall.SysProcAttr) *other {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("", "attest") // not t.TempDir: other users must get in
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	os.Chmod(dir, 0o755)
	path := filepath.Join(dir, "other")
	if err := os.Link(self, path); err != nil {
		copyFile(t, self, path)
	}
	os.Chmod(path, 0o755)
	o := &other{Cmd: exec.Command(path), path: path}
	o.Env = append(os.Environ(), "ENTENTE_TEST_CHILD="+what, "ENTENTE_TEST_ADDRESS="+address)
	o.Stderr = os.Stderr
	if len(attr) > 0 {
		o.SysProcAttr = attr[0]
	}
	if o.stdin, err = o.StdinPipe(); err != nil {
		t.Fatal(err)
	}
	out, err := o.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	o.out = bufio.NewReader(out)
	if err := o.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { o.end() })
	return o
}

func (o *other) line(t *testing.T) string {
	t.Helper()
	line, err := o.out.ReadString('\n')
	if err != nil {
		t.Fatalf("child: %v %q", err, line)
	}
	return strings.TrimSpace(line)
}

func (o *other) end() {
	o.stdin.Close()
	o.Process.Kill()
	o.Wait()
}

func copyFile(t *testing.T, from, to string) {
	t.Helper()
	data, err := os.ReadFile(from)
	if err == nil {
		err = os.WriteFile(to, data, 0o755)
	}
	if err != nil {
		t.Fatal(err)
	}
}

func unixListener(t *testing.T) *net.UnixListener {
	t.Helper()
	dir, err := os.MkdirTemp("", "attest")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	os.Chmod(dir, 0o755)
	l, err := net.Listen("unix", filepath.Join(dir, "s"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l.(*net.UnixListener)
}

func tcpListener(t *testing.T) net.Listener {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}

func accept[C net.Conn](t *testing.T, l net.Listener) C {
	t.Helper()
	conn, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn.(C)
}

func digestOf(t *testing.T, path string) string {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:])
}

// Every selector is looked at, and each wrong one is enough to refuse.
func TestSelectors(t *testing.T) {
	l := unixListener(t)
	o := start(t, "dial-unix", l.Addr().String())
	p, err := New().Unix(accept[*net.UnixConn](t, l))
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	if p.PID() != o.Process.Pid || int(p.UID) != os.Getuid() {
		t.Errorf("attested pid %d uid %d, want %d %d", p.PID(), p.UID, o.Process.Pid, os.Getuid())
	}

	self, _ := os.Executable()
	uid := "unix:uid:" + strconv.Itoa(os.Getuid())
	sum := "unix:sha256:" + digestOf(t, o.path)
	tests := []struct {
		name string
		want []string
		ok   bool
	}{
		{"user", []string{uid}, true},
		{"group", []string{uid, "unix:gid:" + strconv.Itoa(os.Getgid())}, true},
		{"path", []string{uid, "unix:path:" + o.path}, true},
		{"digest", []string{sum}, true},
		{"all", []string{uid, sum, "unix:path:" + o.path}, true},

		{"none", nil, false},
		{"other user", []string{"unix:uid:4711"}, false},
		{"unknown user name", []string{"unix:user:nobody-of-this-name"}, false},
		{"other group", []string{uid, "unix:gid:4711"}, false},
		{"path of another hard link to the same file", []string{uid, "unix:path:" + self}, false},
		{"path that is not there", []string{uid, "unix:path:/does/not/exist"}, false},
		{"other digest", []string{"unix:sha256:" + strings.Repeat("0", 64)}, false},
		{"one wrong of three", []string{uid, "unix:path:" + o.path, "unix:sha256:" + strings.Repeat("0", 64)}, false},
		{"unknown kind", []string{uid, "unix:shoe:42"}, false},
	}
	for _, test := range tests {
		if err := p.Satisfies(test.want); (err == nil) != test.ok {
			t.Errorf("%s: %v satisfied: %v", test.name, test.want, err)
		}
	}
}

// A path counts by device and inode as well: in a mount namespace of its own a
// process can have any file at any path.
func TestPathInAnotherMountNamespace(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root, to mount")
	}
	self, _ := os.Executable()
	dir := t.TempDir()
	good, evil := filepath.Join(dir, "good"), filepath.Join(dir, "evil")
	copyFile(t, self, good)
	copyFile(t, self, evil)
	want := []string{"unix:uid:0", "unix:path:" + good}

	attest := func(script string) error {
		l := unixListener(t)
		cmd := exec.Command("/bin/sh", "-c", script)
		cmd.Env = append(os.Environ(), "ENTENTE_TEST_CHILD=dial-unix", "ENTENTE_TEST_ADDRESS="+l.Addr().String())
		cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS}
		cmd.Stderr = os.Stderr
		stdin, err := cmd.StdinPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Skipf("no mount namespace to be had: %v", err)
		}
		defer cmd.Wait()
		defer stdin.Close()
		p, err := New().Unix(accept[*net.UnixConn](t, l))
		if err != nil {
			t.Fatal(err)
		}
		defer p.Close()
		return p.Satisfies(want)
	}
	if err := attest("exec " + good); err != nil {
		t.Errorf("control: %v", err)
	}
	if _, err := exec.LookPath("mount"); err != nil {
		t.Skip(err)
	}
	err := attest("mount --bind " + evil + " " + good + " && exec " + good)
	if err == nil || !strings.Contains(err.Error(), "mount namespace") {
		t.Errorf("a process with another file mounted at the path: %v", err)
	}
}

func TestPathOfReplacedFile(t *testing.T) {
	l := unixListener(t)
	o := start(t, "dial-unix", l.Addr().String())
	p, err := New().Unix(accept[*net.UnixConn](t, l))
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	want := []string{"unix:uid:" + strconv.Itoa(os.Getuid()), "unix:path:" + o.path}
	if err := p.Satisfies(want); err != nil {
		t.Fatalf("control: %v", err)
	}
	if err := os.Remove(o.path); err != nil {
		t.Fatal(err)
	}
	self, _ := os.Executable()
	copyFile(t, self, o.path)
	if err := p.Satisfies(want); err == nil {
		t.Error("a process that runs another file than the one at the path satisfied it")
	}
}

// A symbolic link on the way to the path is followed as the agent sees it.
func TestPathThroughSymlink(t *testing.T) {
	l := unixListener(t)
	o := start(t, "dial-unix", l.Addr().String())
	p, err := New().Unix(accept[*net.UnixConn](t, l))
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	link := filepath.Join(t.TempDir(), "link")
	if err := os.Symlink(filepath.Dir(o.path), link); err != nil {
		t.Fatal(err)
	}
	if err := p.Satisfies([]string{"unix:uid:" + strconv.Itoa(os.Getuid()), "unix:path:" + link + "/other"}); err != nil {
		t.Error(err)
	}
}

// A process that has ended satisfies nothing any more, and neither does the one
// that gets its pid next.
func TestRecycledPID(t *testing.T) {
	l := unixListener(t)
	o := start(t, "dial-unix", l.Addr().String())
	p, err := New().Unix(accept[*net.UnixConn](t, l))
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	want := []string{"unix:uid:" + strconv.Itoa(os.Getuid())}
	if err := p.Satisfies(want); err != nil {
		t.Fatalf("control: %v", err)
	}
	if p.handle.start, err = p.handle.born(); err != nil { // for the end of this test
		t.Fatal(err)
	}
	pid := o.Process.Pid
	time.Sleep(30 * time.Millisecond) // start times count clock ticks of 10 ms
	o.end()
	if err := p.Satisfies(want); err == nil {
		t.Error("a process that has ended satisfied its selectors")
	}

	impostor := startAs(t, pid, l.Addr().String())
	control, err := New().Unix(accept[*net.UnixConn](t, l))
	if err != nil {
		t.Fatal(err)
	}
	defer control.Close()
	if err := control.Satisfies(append(want, "unix:path:"+impostor.path)); err != nil {
		t.Fatalf("control: %v", err)
	}
	for _, selectors := range [][]string{want, append(want, "unix:path:"+o.path), {"unix:sha256:" + digestOf(t, impostor.path)}} {
		if err := p.Satisfies(selectors); err == nil {
			t.Errorf("the process that got the pid next satisfied %v", selectors)
		}
	}

	// The same without pidfds: an old kernel. The open /proc/PID is of the process
	// that has ended, and its start time of the one that runs now.
	p.handle.pidfd, p.handle.dir = -1, openProc(t, pid)
	if err := p.Alive(); err == nil {
		t.Error("by start time, the recycled pid passes for the process that has ended")
	}
}

func openProc(t *testing.T, pid int) *os.File {
	t.Helper()
	dir, err := os.OpenFile("/proc/"+strconv.Itoa(pid), syscall.O_DIRECTORY, 0)
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

// startAs makes the kernel give out a pid again.
func startAs(t *testing.T, pid int, address string) *other {
	t.Helper()
	for range 200 {
		if err := os.WriteFile("/proc/sys/kernel/ns_last_pid", []byte(strconv.Itoa(pid-1)), 0); err != nil {
			t.Skipf("the kernel lets nobody choose pids here: %v", err)
		}
		o := start(t, "dial-unix", address)
		if o.Process.Pid == pid {
			return o
		}
		o.end()
	}
	t.Skip("other processes took the pid each time")
	return nil
}

// The owner of an accepted loopback connection is attested, not whoever else runs.
func TestTCPOwner(t *testing.T) {
	a := New()
	l := tcpListener(t)
	o := start(t, "dial-tcp", l.Addr().String())
	conn := accept[net.Conn](t, l)
	uid := "unix:uid:" + strconv.Itoa(os.Getuid())
	self, _ := os.Executable()

	for range 2 { // the second time the owner is known
		p, err := a.TCP(conn)
		if err != nil {
			t.Fatal(err)
		}
		if err := p.Satisfies([]string{uid}); err != nil || p.PID() != 0 {
			t.Errorf("by user alone: %v, pid %d looked for", err, p.PID())
		}
		if err := p.Satisfies([]string{uid, "unix:path:" + o.path}); err != nil {
			t.Errorf("control: the owner: %v", err)
		}
		if err := p.Satisfies([]string{uid, "unix:path:" + self}); err == nil {
			t.Error("a connection passed for another process's")
		}
		if p.PID() != o.Process.Pid {
			t.Errorf("pid %d, want %d", p.PID(), o.Process.Pid)
		}
		p.Close()
	}

	// Another process on the port: it is the one that is attested, cache or not.
	own, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer own.Close()
	p, err := a.TCP(accept[net.Conn](t, l))
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	if err := p.Satisfies([]string{uid, "unix:path:" + o.path}); err == nil {
		t.Error("another process on the port passed for the one before")
	}
	if err := p.Satisfies([]string{uid, "unix:path:" + self}); err != nil {
		t.Errorf("control: %v", err)
	}
}

// The kernel reports the sockets that nobody owns any more as root's.
func TestTCPOwnerGone(t *testing.T) {
	l := tcpListener(t)
	client, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	conn := accept[net.Conn](t, l)
	if p, err := New().TCP(conn); err != nil {
		t.Fatalf("control: %v", err)
	} else {
		p.Close()
	}
	client.Close()
	p, err := New().TCP(conn)
	if err == nil {
		err = p.Satisfies([]string{"unix:uid:0"})
		p.Close()
	}
	if err == nil {
		t.Error("a connection that its owner has closed was attested")
	}
}

func TestListener(t *testing.T) {
	a := New()
	o := start(t, "listen", "127.0.0.1:0")
	address := netip.MustParseAddrPort(o.line(t))
	uid := "unix:uid:" + strconv.Itoa(os.Getuid())

	p, err := a.Listener(address)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	if err := p.Satisfies([]string{uid, "unix:path:" + o.path}); err != nil {
		t.Errorf("control: %v", err)
	}
	mine := netip.MustParseAddrPort(tcpListener(t).Addr().String())
	impostor, err := a.Listener(mine)
	if err != nil {
		t.Fatal(err)
	}
	defer impostor.Close()
	if err := impostor.Satisfies([]string{uid, "unix:path:" + o.path}); err == nil {
		t.Error("an impostor's listener passed for the application's")
	}
	o.end()
	if _, err := a.Listener(address); err == nil {
		t.Error("a port on which nobody listens was attested")
	}
}

// Listeners on every address, also through IPv6, answer for the loopback.
func TestListenerOnEveryAddress(t *testing.T) {
	for _, network := range []string{"tcp4", "tcp"} {
		l, err := net.Listen(network, ":0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		port := uint16(l.Addr().(*net.TCPAddr).Port)
		p, err := New().Listener(netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), port))
		if err != nil {
			t.Errorf("%s: %v", network, err)
			continue
		}
		if self, _ := os.Executable(); p.Satisfies([]string{"unix:uid:" + strconv.Itoa(os.Getuid()), "unix:path:" + self}) != nil {
			t.Errorf("%s: the listener's owner was not found", network)
		}
		p.Close()
	}
}

// An application with IPv6 sockets that dials 127.0.0.1 is attested as well.
func TestTCPOverIPv6(t *testing.T) {
	for _, listen := range []string{"[::1]:0", "127.0.0.1:0"} {
		l, err := net.Listen("tcp", listen)
		if err != nil {
			t.Skip(err)
		}
		defer l.Close()
		address := l.Addr().String()
		if listen[0] != '[' {
			address = fmt.Sprintf("[::ffff:127.0.0.1]:%d", l.Addr().(*net.TCPAddr).Port)
		}
		client, err := net.Dial("tcp", address)
		if err != nil {
			t.Fatal(err)
		}
		defer client.Close()
		p, err := New().TCP(accept[net.Conn](t, l))
		if err != nil {
			t.Errorf("%s: %v", address, err)
			continue
		}
		if err := p.Satisfies([]string{"unix:uid:" + strconv.Itoa(os.Getuid())}); err != nil {
			t.Error(err)
		}
		p.Close()
	}
}

func TestTCPFromElsewhereIsRefused(t *testing.T) {
	elsewhere := &net.TCPAddr{IP: net.IPv4(192, 0, 2, 1), Port: 4711}
	conn := fakeConn{local: &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 1}, remote: elsewhere}
	if _, err := New().TCP(conn); err == nil || !strings.Contains(err.Error(), "not a loopback address") {
		t.Errorf("a connection from another host: %v", err)
	}
	if _, err := New().Listener(netip.MustParseAddrPort("192.0.2.1:80")); err == nil {
		t.Error("a listener of another host was attested")
	}
}

type fakeConn struct {
	net.Conn
	local, remote net.Addr
}

func (c fakeConn) LocalAddr() net.Addr  { return c.local }
func (c fakeConn) RemoteAddr() net.Addr { return c.remote }

// Without the privilege to look at other users' processes only their user counts,
// and the error says what to do.
func TestWithoutPrivilege(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root, to become nobody")
	}
	o := start(t, "attest", "127.0.0.1:0", &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}})
	conn, err := net.Dial("tcp", o.line(t))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if line := o.line(t); line != "uid: <nil>" {
		t.Errorf("by user alone: %s", line)
	}
	if line := o.line(t); !strings.HasPrefix(line, "path: ") || !strings.Contains(line, "CAP_SYS_PTRACE") {
		t.Errorf("by path: %s", line)
	}
}

// Another user's process is not taken for one of ours.
func TestOtherUser(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root, to become nobody")
	}
	l := unixListener(t)
	os.Chmod(l.Addr().String(), 0o777)
	o := start(t, "dial-unix", l.Addr().String(), &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}})
	p, err := New().Unix(accept[*net.UnixConn](t, l))
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	if err := p.Satisfies([]string{"unix:uid:65534", "unix:user:nobody", "unix:path:" + o.path}); err != nil {
		t.Errorf("control: %v", err)
	}
	if err := p.Satisfies([]string{"unix:uid:0", "unix:path:" + o.path}); err == nil {
		t.Error("a process of nobody passed for root's")
	}
}

// The digest is read once for each content.
func TestDigestIsCached(t *testing.T) {
	l := unixListener(t)
	a := New()
	want := ""
	for range 2 {
		o := start(t, "dial-unix", l.Addr().String())
		p, err := a.Unix(accept[*net.UnixConn](t, l))
		if err != nil {
			t.Fatal(err)
		}
		if want == "" {
			want = "unix:sha256:" + digestOf(t, o.path)
		}
		if err := p.Satisfies([]string{want}); err != nil {
			t.Error(err)
		}
		p.Close()
	}
	if n := len(a.digests); n != 1 && n != 2 { // a new hard link changes the file's change time
		t.Errorf("%d digests are held", n)
	}
}

func TestClosedProcessSatisfiesNothing(t *testing.T) {
	l := unixListener(t)
	client, err := net.Dial("unix", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	p, err := New().Unix(accept[*net.UnixConn](t, l))
	if err != nil {
		t.Fatal(err)
	}
	uid := []string{"unix:uid:" + strconv.Itoa(os.Getuid())}
	if err := p.Satisfies(uid); err != nil {
		t.Fatalf("control: %v", err)
	}
	p.Close()
	if err := p.Satisfies(uid); err == nil {
		t.Error("a process that was let go of satisfied its selectors")
	}
}

// Whoever is of another user costs no search and no digest, in whichever order the
// selectors stand.
func TestOtherUserIsCheap(t *testing.T) {
	p := &Process{UID: 4711, find: func() (*handle, error) { t.Error("searched"); return nil, errors.New("searched") }}
	if err := p.Satisfies([]string{"unix:sha256:" + strings.Repeat("0", 64), "unix:path:/bin/true", "unix:uid:1"}); err == nil {
		t.Error("another user satisfied the selectors")
	}
}

func TestSearchFindsNobody(t *testing.T) {
	nobodys := socket{uid: uint32(os.Getuid()), inode: 1<<32 - 2}
	same := func() (socket, error) { return nobodys, nil }
	if _, err := New().findOwner(nobodys, netip.AddrPort{}, same); err == nil || errors.Is(err, errNotOwner) || errors.Is(err, errNoOwner) {
		t.Errorf("a socket that nobody has: %v", err)
	}
	closed := func() (socket, error) { return socket{uid: nobodys.uid}, nil }
	if _, err := New().findOwner(nobodys, netip.AddrPort{}, closed); !errors.Is(err, errNoOwner) {
		t.Errorf("a socket that was closed while others were searched for: %v", err)
	}
}

func BenchmarkUnix(b *testing.B) {
	dir := b.TempDir()
	l, err := net.Listen("unix", filepath.Join(dir, "s"))
	if err != nil {
		b.Fatal(err)
	}
	defer l.Close()
	client, err := net.Dial("unix", l.Addr().String())
	if err != nil {
		b.Fatal(err)
	}
	defer client.Close()
	conn, err := l.Accept()
	if err != nil {
		b.Fatal(err)
	}
	defer conn.Close()
	self, _ := os.Executable()
	want := []string{"unix:uid:" + strconv.Itoa(os.Getuid()), "unix:path:" + self}
	a := New()
	for b.Loop() {
		p, err := a.Unix(conn.(*net.UnixConn))
		if err != nil {
			b.Fatal(err)
		}
		if err := p.Satisfies(want); err != nil {
			b.Fatal(err)
		}
		p.Close()
	}
}

func BenchmarkTCP(b *testing.B) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		b.Fatal(err)
	}
	defer l.Close()
	client, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		b.Fatal(err)
	}
	defer client.Close()
	conn, err := l.Accept()
	if err != nil {
		b.Fatal(err)
	}
	defer conn.Close()
	self, _ := os.Executable()
	want := []string{"unix:uid:" + strconv.Itoa(os.Getuid()), "unix:path:" + self}
	a := New()
	for b.Loop() {
		p, err := a.TCP(conn)
		if err != nil {
			b.Fatal(err)
		}
		if err := p.Satisfies(want); err != nil {
			b.Fatal(err)
		}
		p.Close()
	}
}

// The far end of a connection is who has it, not who listens at the address by now.
func TestAcceptor(t *testing.T) {
	a := New()
	uid := "unix:uid:" + strconv.Itoa(os.Getuid())
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	impostor := tcpListener(t)
	address := impostor.Addr().String()
	conn, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	taken, err := impostor.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	impostor.Close()
	application := start(t, "listen", address)
	if line := application.line(t); line != address {
		t.Fatal(line)
	}
	expect := func(conn net.Conn, accepted bool, path string, satisfied bool) {
		t.Helper()
		p, got, err := a.Acceptor(conn)
		if err != nil {
			t.Fatal(err)
		}
		defer p.Close()
		if got != accepted {
			t.Errorf("accepted: %v", got)
		}
		if err := p.Satisfies([]string{uid, "unix:path:" + path}); (err == nil) != satisfied {
			t.Errorf("%s: %v", path, err)
		}
	}
	listener, err := a.Listener(netip.MustParseAddrPort(address))
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	if err := listener.Satisfies([]string{uid, "unix:path:" + application.path}); err != nil {
		t.Fatalf("the application listens there now: %v", err)
	}
	expect(conn, true, application.path, false)
	expect(conn, true, self, true)

	// Controls: what the application has not accepted yet is its own, and so is what it has.
	waiting, err := net.Dial("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	defer waiting.Close()
	expect(waiting, false, application.path, true)

	mine := tcpListener(t)
	dialled, err := net.Dial("tcp", mine.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer dialled.Close()
	accepted, err := mine.Accept()
	if err != nil {
		t.Fatal(err)
	}
	expect(dialled, true, self, true)
	accepted.Close()
	if p, _, err := a.Acceptor(dialled); err == nil {
		p.Close()
		t.Error("a connection that its acceptor has closed was attested")
	}

	path := filepath.Join(t.TempDir(), "a.sock")
	socket, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer socket.Close()
	unixConn, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer unixConn.Close()
	expect(unixConn, true, self, true)
	expect(unixConn, true, application.path, false)
}

// Each kind of selectors is looked at, and shown to people, but for runs: an id is nobody's
// to read.
func TestEveryKindOfSelectorIsLookedAt(t *testing.T) {
	process, err := New().PID(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	defer process.Close()
	for _, kind := range selector.Kinds() {
		if err := process.Satisfies([]string{kind.Name + ":" + kind.Example}); errors.Is(err, errLater) {
			t.Errorf("%s: %v", kind.Name, err)
		}
	}
	if err := process.Glance().Satisfies([]selector.Selector{{Kind: "tpm:quote", Value: "x"}}); !errors.Is(err, errLater) {
		t.Errorf("of a later release: %v", err)
	}
	for _, seen := range process.Selectors() {
		if s, err := selector.Parse(seen.Kind + ":" + seen.Value); seen.Err == nil && (err != nil || process.Satisfies([]string{s.String()}) != nil) {
			t.Errorf("what is shown, %s:%s, is not what entries would name: %v", seen.Kind, seen.Value, err)
		}
	}
}
