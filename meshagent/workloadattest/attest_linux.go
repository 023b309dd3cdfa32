package workloadattest

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"sync"

	"golang.org/x/sys/unix"
)

const (
	maxExecutable = 1 << 30 // bytes that are read for a digest
	maxCached     = 4096    // digests, and owners of connections
	maxCmdline    = 2 << 20 // bytes; the kernel takes no more from the shell by default
	maxRuns       = 1024    // registered processes
	maxDepth      = 64      // generations between a process and the one that was registered
)

// Attestor attests processes of the network and pid namespace it runs in. Its
// methods may be called concurrently.
type Attestor struct {
	strict bool
	// peerPidfd asks a unix socket for the process that connected, ENOPROTOOPT before Linux 6.5.
	peerPidfd func(fd int) (int, error)

	hashing   sync.Mutex // one executable at a time is read: no workload can keep every core busy
	searching sync.Mutex // so with the search of all processes' open files

	mu      sync.Mutex
	digests map[fileVersion]string
	owners  map[netip.AddrPort]int // the pid that last owned a connection to (or the listener at) an address: tried first
	runs    map[string]*handle     // registered processes, by the id of their run
}

// fileVersion names the content of a file. The change time is part of it since,
// unlike the modification time, nobody can set it back.
type fileVersion struct {
	dev, ino     uint64
	size         int64
	mtime, ctime unix.Timespec
}

// New returns an attestor.
func New(options ...Option) *Attestor {
	a := &Attestor{peerPidfd: peerPidfd, digests: map[fileVersion]string{}, owners: map[netip.AddrPort]int{}, runs: map[string]*handle{}}
	for _, option := range options {
		option(a)
	}
	return a
}

func peerPidfd(fd int) (int, error) {
	return unix.GetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_PEERPIDFD)
}

// Gap says what this kernel leaves uncertain about the peers of unix sockets; empty: nothing.
func (a *Attestor) Gap() string {
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return ""
	}
	defer unix.Close(pair[0])
	defer unix.Close(pair[1])
	pidfd, err := a.peerPidfd(pair[0])
	closeFD(max(pidfd, -1))
	switch {
	case !errors.Is(err, unix.ENOPROTOOPT):
		return ""
	case a.strict:
		return "this kernel does not say which process connected to a unix socket (Linux 6.5 does): strict, so that only unix:uid and unix:user count there"
	default:
		return "this kernel does not say which process connected to a unix socket (Linux 6.5 does): a process that connects and ends can be taken for another one of the same user that is given its number; " +
			"workloadAttestation: {strict: true} lets only unix:uid and unix:user count there"
	}
}

// Unix attests the process that connected conn, which the kernel remembers.
func (a *Attestor) Unix(conn *net.UnixConn) (*Process, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return nil, fmt.Errorf("cannot ask for the socket's peer: %w", err)
	}
	var cred *unix.Ucred
	var credErr error
	pidfd := -1
	err = raw.Control(func(fd uintptr) {
		if cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); credErr != nil {
			return
		}
		// Since Linux 6.5 the kernel hands out the very process that connected.
		pidfd, credErr = a.peerPidfd(int(fd))
		if errors.Is(credErr, unix.ENOPROTOOPT) {
			pidfd, credErr = -1, nil
		}
	})
	if err = errors.Join(err, credErr); err != nil {
		return nil, fmt.Errorf("cannot ask for the socket's peer: %w", err)
	}
	if cred.Pid <= 0 {
		closeFD(pidfd)
		return nil, errors.New("the socket's peer is in another pid namespace, which this agent cannot see into")
	}
	certain := pidfd >= 0
	h, err := hold(int(cred.Pid), pidfd)
	if err != nil {
		return nil, err
	}
	h.gid = cred.Gid
	p := &Process{UID: cred.Uid, attestor: a, handle: h}
	if certain {
		return p, nil
	}
	if err := h.runsAs(cred.Uid); err != nil {
		h.close()
		return nil, err
	}
	if a.strict {
		p.unsure = errStrict
	}
	return p, nil
}

// TCP attests the owner of the far end of a loopback connection that was
// accepted on this host.
func (a *Attestor) TCP(conn net.Conn) (*Process, error) {
	near, err := loopback(conn.LocalAddr())
	if err != nil {
		return nil, err
	}
	far, err := loopback(conn.RemoteAddr())
	if err != nil {
		return nil, err
	}
	look := func() (socket, error) { return diagnose(far, near) }
	s, err := look()
	if err != nil {
		return nil, fmt.Errorf("cannot find the socket that connected from %s: %w", far, err)
	}
	if s.state == tcpListen {
		return nil, fmt.Errorf("the connection from %s is gone", far)
	}
	return a.owner(s, near, look)
}

// Listener attests the process that listens on a loopback address. Another
// socket on the same port can only be of the same user.
func (a *Attestor) Listener(addr netip.AddrPort) (*Process, error) {
	if !addr.Addr().IsLoopback() {
		return nil, fmt.Errorf("%s is not a loopback address", addr)
	}
	look := func() (socket, error) { return diagnose(addr, netip.AddrPort{}) }
	s, err := look()
	if err != nil {
		return nil, fmt.Errorf("cannot find who listens on %s: %w", addr, err)
	}
	if s.state != tcpListen {
		return nil, fmt.Errorf("nobody listens on %s", addr)
	}
	return a.owner(s, addr, look)
}

// Acceptor attests the process at the far end of a local connection that this process
// opened. Of a unix socket that is who listened when the connection was made. A TCP
// connection that nobody has accepted yet belongs to who listens (accepted is false): it
// would have ended with the listener.
func (a *Attestor) Acceptor(conn net.Conn) (p *Process, accepted bool, err error) {
	if unixConn, ok := conn.(*net.UnixConn); ok {
		p, err = a.Unix(unixConn)
		return p, true, err
	}
	near, err := loopback(conn.LocalAddr())
	if err != nil {
		return nil, false, err
	}
	far, err := loopback(conn.RemoteAddr())
	if err != nil {
		return nil, false, err
	}
	look := func() (socket, error) {
		s, err := diagnose(far, near)
		switch {
		case err != nil:
			return s, fmt.Errorf("cannot find the socket that accepted the connection to %s: %w", far, err)
		case s.state == tcpListen:
			return s, fmt.Errorf("the connection to %s is gone", far)
		}
		return s, nil
	}
	s, err := look()
	if err != nil {
		return nil, false, err
	}
	if s.inode == 0 && (s.state == tcpEstablished || s.state == tcpSynReceived || s.state == tcpNewSynReceived) {
		if p, err = a.Listener(far); err != nil {
			return nil, false, err
		}
		// Had it been accepted before that look, by who listened before, it would show now.
		if s, err = look(); err == nil && s.inode == 0 {
			return p, false, nil
		}
		p.Close()
		if err != nil {
			return nil, false, err
		}
	}
	p, err = a.owner(s, far, look)
	return p, true, err
}

// owner makes a process of a socket. A socket that its process has closed has no
// inode, and its user is then not to be believed (the kernel says 0).
func (a *Attestor) owner(s socket, address netip.AddrPort, look func() (socket, error)) (*Process, error) {
	if s.inode == 0 {
		return nil, errNoOwner
	}
	return &Process{UID: s.uid, attestor: a, find: func() (*handle, error) { return a.findOwner(s, address, look) }}, nil
}

// PID attests a process by its number, for people who ask.
func (a *Attestor) PID(pid int) (*Process, error) {
	h, err := hold(pid, -1)
	if err != nil {
		return nil, err
	}
	text, err := h.read("status")
	if err == nil {
		var is status
		if is, err = parseStatus(text); err == nil {
			h.gid = is.gid
			return &Process{UID: is.uid, attestor: a, handle: h}, h.alive()
		}
	}
	h.close()
	return nil, fmt.Errorf("cannot look at process %d: %w", pid, err)
}

var errNoOwner = errors.New("no process owns the socket any more")

func loopback(addr net.Addr) (netip.AddrPort, error) {
	tcp, ok := addr.(*net.TCPAddr)
	if !ok {
		return netip.AddrPort{}, fmt.Errorf("%v is not a TCP address", addr)
	}
	ap := netip.AddrPortFrom(tcp.AddrPort().Addr().Unmap().WithZone(""), tcp.AddrPort().Port())
	if !ap.Addr().IsLoopback() {
		return netip.AddrPort{}, fmt.Errorf("%s is not a loopback address: only processes of this host can be attested", ap)
	}
	return ap, nil
}

// findOwner searches the open files of the host's processes for a socket. The
// process that last had a connection to the same address is looked at first. look
// asks for the socket again: those who did not wait are not searched for.
func (a *Attestor) findOwner(s socket, address netip.AddrPort, look func() (socket, error)) (*handle, error) {
	if h, err := a.lastOwner(s, address); err == nil {
		return h, nil
	}
	a.searching.Lock()
	defer a.searching.Unlock()
	if h, err := a.lastOwner(s, address); err == nil { // found for somebody else meanwhile
		return h, nil
	}
	if now, err := look(); err != nil || now.inode != s.inode {
		return nil, errNoOwner
	}

	proc, err := os.Open("/proc")
	if err != nil {
		return nil, err
	}
	defer proc.Close()
	names, err := proc.Readdirnames(-1)
	if err != nil {
		return nil, err
	}
	hidden := 0
	for _, name := range names {
		pid, err := strconv.Atoi(name)
		if err != nil {
			continue
		}
		h, err := holdOwner(pid, s)
		if errors.Is(err, os.ErrPermission) {
			hidden++
		}
		if err != nil {
			continue
		}
		a.mu.Lock()
		if len(a.owners) >= maxCached {
			clear(a.owners)
		}
		a.owners[address] = pid
		a.mu.Unlock()
		return h, nil
	}
	if hidden > 0 {
		return nil, fmt.Errorf("the agent may not look at %d processes of other users: run it with CAP_SYS_PTRACE, or let the entry have no selector but the user's", hidden)
	}
	return nil, errors.New("no process has the socket open")
}

// lastOwner holds the process that last owned a connection to the address, if it
// has this socket, too.
func (a *Attestor) lastOwner(s socket, address netip.AddrPort) (*handle, error) {
	a.mu.Lock()
	last := a.owners[address]
	a.mu.Unlock()
	if last == 0 {
		return nil, errNotOwner
	}
	return holdOwner(last, s)
}

// errNotOwner is what nearly every process of a search answers.
var errNotOwner = errors.New("the process does not have the socket open")

// holdOwner holds a process if it has the socket open and is of the socket's user.
func holdOwner(pid int, s socket) (*handle, error) {
	h, err := hold(pid, -1)
	if err != nil {
		return nil, err
	}
	if err = h.owns(s); err != nil {
		h.close()
		return nil, err
	}
	return h, nil
}

// handle holds one process.
type handle struct {
	pid   int
	gid   uint32
	pidfd int      // -1: the kernel has none
	dir   *os.File // /proc/PID
	start uint64   // clock ticks since boot; without a pidfd only, see born
}

// hold opens a process. With a pidfd from the kernel it is certain that pid is
// that process: it still runs after /proc/PID was opened, so that its pid cannot
// have been given away before.
func hold(pid, pidfd int) (*handle, error) {
	dir, err := os.OpenFile("/proc/"+strconv.Itoa(pid), unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		closeFD(pidfd)
		return nil, fmt.Errorf("process %d has ended", pid)
	}
	if pidfd < 0 {
		if pidfd, err = unix.PidfdOpen(pid, 0); err != nil && !errors.Is(err, unix.ENOSYS) {
			dir.Close()
			return nil, fmt.Errorf("process %d has ended", pid)
		}
	}
	h := &handle{pid: pid, pidfd: pidfd, dir: dir}
	if pidfd < 0 {
		h.start, err = h.started()
	}
	if err == nil {
		err = h.alive()
	}
	if err != nil {
		h.close()
		return nil, err
	}
	return h, nil
}

func closeFD(fd int) {
	if fd >= 0 {
		unix.Close(fd)
	}
}

func (h *handle) close() {
	closeFD(h.pidfd)
	h.dir.Close()
}

// alive returns nil while the process runs.
func (h *handle) alive() error {
	ended := fmt.Errorf("process %d has ended", h.pid)
	if h.pidfd < 0 { // an old kernel: the open directory and the start time must do
		if start, err := h.started(); err != nil || start != h.start {
			return ended
		}
		return nil
	}
	poll := []unix.PollFd{{Fd: int32(h.pidfd), Events: unix.POLLIN}}
	for {
		n, err := unix.Poll(poll, 0)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return fmt.Errorf("cannot tell whether process %d runs: %w", h.pid, err)
		case n > 0:
			return ended
		default:
			return nil
		}
	}
}

// read returns a small file of /proc/PID.
func (h *handle) read(name string) ([]byte, error) {
	fd, err := unix.Openat(int(h.dir.Fd()), name, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: h.path(name), Err: err}
	}
	f := os.NewFile(uintptr(fd), h.path(name))
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, 1<<16))
}

func (h *handle) path(name string) string { return filepath.Join(h.dir.Name(), name) }

// born is the start time of the process. It is dear to ask for: with a pidfd only
// selectors that rest on parents need it.
func (h *handle) born() (uint64, error) {
	start, err := h.started()
	if err == nil {
		err = h.alive() // so that it was this process's
	}
	return start, err
}

func (h *handle) started() (uint64, error) {
	data, err := h.read("stat")
	if err != nil {
		return 0, err
	}
	return parseStartTime(data)
}

// runsAs returns nil if the process is of that user.
func (h *handle) runsAs(uid uint32) error {
	text, err := h.read("status")
	if err != nil {
		return err
	}
	is, err := parseStatus(text)
	if err != nil {
		return err
	}
	if is.uid != uid {
		return fmt.Errorf("uid %d connected, and process %d runs as uid %d: the one that connected has ended, or has changed its user", uid, h.pid, is.uid)
	}
	return h.alive()
}

// owns returns nil if the process is of the socket's user and has it open.
func (h *handle) owns(s socket) error {
	text, err := h.read("status")
	if err != nil {
		return err
	}
	is, err := parseStatus(text)
	if err != nil {
		return err
	}
	if is.uid != s.uid {
		return errNotOwner
	}
	h.gid = is.gid

	fd, err := unix.Openat(int(h.dir.Fd()), "fd", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: h.path("fd"), Err: err}
	}
	files := os.NewFile(uintptr(fd), h.path("fd"))
	defer files.Close()
	wanted := "socket:[" + strconv.FormatUint(uint64(s.inode), 10) + "]"
	link := make([]byte, len(wanted)+1)
	for {
		names, err := files.Readdirnames(256)
		for _, name := range names {
			n, err := unix.Readlinkat(int(files.Fd()), name, link)
			if err == nil && string(link[:n]) == wanted {
				return h.alive()
			}
		}
		if err == io.EOF {
			return errNotOwner
		}
		if err != nil {
			return err
		}
	}
}

// runs returns nil if the executable is the file at this path as the agent sees it. The name alone proves nothing: in a mount namespace of its own a
// process can have any file there. The device and inode alone do not either: they
// are the same for every hard link.
func (e executable) runs(path string) error {
	var want unix.Stat_t
	if err := unix.Stat(path, &want); err != nil {
		if e.name != path {
			return runsOther(e.name)
		}
		return fmt.Errorf("the agent cannot look at that path: %w", err)
	}
	same := e.dev == want.Dev && e.ino == want.Ino
	if e.name != path {
		if !same {
			return runsOther(e.name)
		}
		if resolved, err := filepath.EvalSymlinks(path); err != nil || e.name != resolved {
			return runsOther(e.name)
		}
	}
	if !same {
		return errors.New("the file it runs is not the one the agent sees at that path (another mount namespace, or replaced since)")
	}
	return nil
}

// runsOther is what the process runs in the place of a path.
type runsOther string

func (r runsOther) Error() string { return "it runs " + string(r) }

// executable is what the process runs now.
func (h *handle) executable() (executable, error) {
	var is unix.Stat_t
	if err := unix.Fstatat(int(h.dir.Fd()), "exe", &is, 0); err != nil {
		return executable{}, h.exeError(err)
	}
	name, err := h.exe()
	return executable{name: name, dev: is.Dev, ino: is.Ino}, err
}

// exe is the path of the process's executable as the kernel shows it.
func (h *handle) exe() (string, error) {
	var short [256]byte
	n, err := unix.Readlinkat(int(h.dir.Fd()), "exe", short[:])
	if err == nil && n < len(short) {
		return string(short[:n]), nil
	}
	link := make([]byte, unix.PathMax)
	if n, err = unix.Readlinkat(int(h.dir.Fd()), "exe", link); err != nil {
		return "", h.exeError(err)
	}
	return string(link[:n]), nil
}

func (h *handle) exeError(err error) error {
	if errors.Is(err, os.ErrPermission) {
		return fmt.Errorf("the agent may not look at the executable of process %d: run it with CAP_SYS_PTRACE, or let the entry have no selector but the user's: %w", h.pid, err)
	}
	return fmt.Errorf("cannot look at the executable of process %d: %w", h.pid, err)
}

// digest is the lower-case hex SHA-256 of the process's executable.
func (a *Attestor) digest(h *handle) (string, error) {
	fd, err := unix.Openat(int(h.dir.Fd()), "exe", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", h.exeError(err)
	}
	exe := os.NewFile(uintptr(fd), h.path("exe"))
	defer exe.Close()
	version, err := versionOf(exe)
	if err != nil {
		return "", h.exeError(err)
	}
	if digest, ok := a.cached(version); ok {
		return digest, nil
	}
	if version.size > maxExecutable {
		return "", fmt.Errorf("the executable of process %d has %d bytes; no more than %d are read", h.pid, version.size, maxExecutable)
	}

	a.hashing.Lock()
	defer a.hashing.Unlock()
	if digest, ok := a.cached(version); ok { // read for somebody else meanwhile
		return digest, nil
	}
	hash := sha256.New()
	if _, err := io.Copy(hash, exe); err != nil {
		return "", h.exeError(err)
	}
	if after, err := versionOf(exe); err != nil || after != version {
		return "", fmt.Errorf("the executable of process %d was written to while it was read", h.pid)
	}
	digest := hex.EncodeToString(hash.Sum(nil))
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.digests) >= maxCached {
		clear(a.digests)
	}
	a.digests[version] = digest
	return digest, nil
}

func (a *Attestor) cached(version fileVersion) (string, bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	digest, ok := a.digests[version]
	return digest, ok
}

func versionOf(f *os.File) (fileVersion, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return fileVersion{}, err
	}
	return fileVersion{dev: st.Dev, ino: st.Ino, size: st.Size, mtime: st.Mtim, ctime: st.Ctim}, nil
}

// groups are the process's supplementary groups.
func (h *handle) groups() ([]uint32, error) {
	text, err := h.read("status")
	if err != nil {
		return nil, err
	}
	is, err := parseStatus(text)
	return is.groups, err
}

// cmdline is the lower-case hex SHA-256 of the process's command line.
func (h *handle) cmdline() (string, error) {
	fd, err := unix.Openat(int(h.dir.Fd()), "cmdline", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", fmt.Errorf("cannot look at the command line of process %d: %w", h.pid, err)
	}
	f := os.NewFile(uintptr(fd), h.path("cmdline"))
	defer f.Close()
	hash := sha256.New()
	n, err := io.Copy(hash, io.LimitReader(f, maxCmdline+1))
	switch {
	case err != nil:
		return "", err
	case n == 0:
		return "", errors.New("it has no command line")
	case n > maxCmdline:
		return "", fmt.Errorf("its command line is longer than %d bytes", maxCmdline)
	}
	return hex.EncodeToString(hash.Sum(nil)), nil
}

// initCgroupNamespace is the inode of the host's own cgroup namespace, always
// (PROC_CGROUP_INIT_INO).
const initCgroupNamespace = "cgroup:[4026531835]"

// place reads where the process stands among the host's cgroups. Seen from another
// cgroup namespace than the host's a path proves nothing: whoever made the namespace
// made the names.
func (h *handle) place() (place, error) {
	if ns, err := os.Readlink("/proc/self/ns/cgroup"); err != nil || ns != initCgroupNamespace {
		return place{}, errors.New("the agent runs in a cgroup namespace of its own and cannot tell units and containers: run it in the host's")
	}
	text, err := h.read("cgroup")
	if err != nil {
		return place{}, err
	}
	path, err := parseCgroup(text)
	if err != nil {
		return place{}, err
	}
	return locate(path), nil
}

// Register makes an attested process and all that it starts satisfy run:id:ID, until
// release is called. The process must not be closed before.
func (a *Attestor) Register(id string, p *Process) (release func(), err error) {
	if p.unsure != nil {
		return nil, p.unsure
	}
	h, err := p.held()
	if err != nil {
		return nil, err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	switch {
	case a.runs[id] != nil:
		return nil, errors.New("that id is taken")
	case len(a.runs) >= maxRuns:
		return nil, fmt.Errorf("%d processes are registered; no more are", maxRuns)
	}
	a.runs[id] = h
	return func() {
		a.mu.Lock()
		defer a.mu.Unlock()
		delete(a.runs, id)
	}, nil
}

// belongs returns nil if the process is the registered one or was started below it.
// A parent is always the older one: a pid that was given away meanwhile shows by that.
func (a *Attestor) belongs(h *handle, id string) error {
	a.mu.Lock()
	defer a.mu.Unlock() // keeps root open; a walk is a few small reads
	root := a.runs[id]
	if root == nil {
		return errors.New("no such run is registered with this agent")
	}
	began, err := root.born()
	if err != nil {
		return fmt.Errorf("what the run began with: %w", err)
	}
	pid := h.pid
	born, err := h.born()
	if err != nil {
		return err
	}
	for range maxDepth {
		if pid == root.pid {
			if born != began {
				break
			}
			return h.alive()
		}
		stat, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
		if err != nil {
			break
		}
		start, err := parseStartTime(stat)
		if err != nil || start > born {
			break
		}
		born = start
		if pid, err = parseParent(stat); err != nil || pid <= 1 {
			break
		}
		if stat, err = os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat"); err != nil {
			break
		}
		if start, err = parseStartTime(stat); err != nil || start > born {
			break
		}
		born = start
	}
	return errors.New("it was not started by that run")
}
