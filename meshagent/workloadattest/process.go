// Package workloadattest tells which local process is at the other end of a
// connection, and whether it satisfies the selectors of an entry.
//
// On Linux a process is held by a pidfd and by an open /proc/PID: both speak of
// this process only, also after its pid was given to another one. The peer of a
// unix socket is named by the kernel (SO_PEERCRED, SO_PEERPIDFD); the owner of a
// loopback TCP connection is found by its socket (sock_diag gives user and inode,
// /proc/*/fd the process). On darwin only the user of a unix socket's peer is
// known, and TCP is refused.
//
// Before Linux 6.5 there is no SO_PEERPIDFD: the kernel names the user who connected to a
// unix socket, and the number that his process had. If that process has ended, and the
// number was given to another one of the same user before it was looked at, the other one
// is attested. A strict Attestor lets only the user count there.
//
// Processes of one user are one security domain: they can trace each other and
// hand each other their sockets. A path or digest tells services of one user
// apart; it does not protect them from one another.
package workloadattest

import (
	"cmp"
	"errors"
	"fmt"
	"os/user"
	"slices"
	"strconv"
	"sync"

	"github.com/entente-mesh/entente/ca/selector"
)

// Process is an attested process. Once it has ended, every question about it is
// answered by an error. Its methods may be called concurrently, Close only once
// and last.
type Process struct {
	UID uint32

	attestor *Attestor
	find     func() (*handle, error) // of a TCP socket's owner; nil: held from the begin
	unsure   error                   // why nothing but the user counts; nil: everything does

	mu     sync.Mutex
	using  sync.RWMutex // held by whoever looks, and for writing by Close
	handle *handle      // nil: not looked for yet, or not to be had
	err    error        // why not
}

// PID is the process's id, or 0 while it is not known: the owner of a TCP socket
// is looked for when a selector needs it.
func (p *Process) PID() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.handle == nil {
		return 0
	}
	return p.handle.pid
}

// Close lets go of the process.
func (p *Process) Close() {
	p.using.Lock() // what a stream looks at must not be another process's file by then
	defer p.using.Unlock()
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.handle != nil {
		p.handle.close()
	}
	p.handle, p.find, p.err = nil, nil, errors.New("it was let go of")
}

// held returns the handle, which it looks for first if need be.
func (p *Process) held() (*handle, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.handle == nil && p.err == nil {
		p.handle, p.err = p.find()
	}
	return p.handle, p.err
}

// Alive returns nil while the process runs. It does not look for the owner of a
// TCP socket that nobody asked about.
func (p *Process) Alive() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch {
	case p.handle != nil:
		return p.handle.alive()
	case p.find != nil:
		return nil
	default:
		return p.err
	}
}

// Satisfies returns nil when the process satisfies every selector; there must be
// at least one. The error says which one it does not satisfy, and why, for the
// log; it is not for the process to read.
func (p *Process) Satisfies(selectors []string) error {
	parsed, err := Parse(selectors)
	if err != nil {
		return err
	}
	return p.Glance().Satisfies(parsed)
}

// Parse reads the selectors of an entry and puts them into the order in which they are
// looked at. The user is first: it is known already, and for another user's process
// nothing dear (a search, a digest) is done.
func Parse(selectors []string) ([]selector.Selector, error) {
	parsed := make([]selector.Selector, len(selectors))
	for i, text := range selectors {
		var err error
		if parsed[i], err = selector.Parse(text); err != nil {
			return nil, err
		}
	}
	slices.SortStableFunc(parsed, func(x, y selector.Selector) int { return cmp.Compare(price(x), price(y)) })
	return parsed, nil
}

// Glance is one look at a process for many entries: what they all ask for, the kernel is
// asked once. It is for one goroutine and for the moment.
type Glance struct {
	process *Process
	exe     *executable // nil: not looked at yet
	err     error
}

// executable is a file that a process runs: the name the kernel shows, and which it is.
type executable struct {
	name     string
	dev, ino uint64
}

// errStrict is why only the user of a unix socket's peer counts.
var errStrict = errors.New("before Linux 6.5 it is not certain which process connected, and workloadAttestation.strict lets only unix:uid and unix:user count there")

// errLater is what an agent says of a kind that a later release has.
var errLater = errors.New("this agent cannot attest it")

// Option says how an Attestor attests.
type Option func(*Attestor)

// Strict lets nothing but the user of a unix socket's peer count where the kernel does not
// name the very process that connected (Linux before 6.5).
func Strict(a *Attestor) { a.strict = true }

// Glance begins one.
func (p *Process) Glance() *Glance { return &Glance{process: p} }

// Satisfies is that of Process, for selectors that were parsed.
func (g *Glance) Satisfies(selectors []selector.Selector) error {
	if len(selectors) == 0 {
		return errors.New("no selectors: no process satisfies them")
	}
	p := g.process
	p.using.RLock()
	defer p.using.RUnlock()
	for _, selector := range selectors {
		if err := g.satisfies(selector); err != nil {
			return &unsatisfied{selector, err}
		}
	}
	return p.Alive()
}

// unsatisfied is put into words only when somebody asks: on a host of thousands of
// entries nearly every look ends with one.
type unsatisfied struct {
	selector selector.Selector
	why      error
}

func (u *unsatisfied) Error() string { return u.selector.String() + ": " + u.why.Error() }
func (u *unsatisfied) Unwrap() error { return u.why }

// mismatch is what the process has in the place of a selector's value.
type mismatch string

func (m mismatch) Error() string { return "it is " + string(m) }

func price(s selector.Selector) int {
	switch s.Kind {
	case selector.UID:
		return 0
	case selector.User:
		return 1
	case selector.SHA256, selector.Cmdline:
		return 3
	default:
		return 2
	}
}

func (g *Glance) satisfies(s selector.Selector) error {
	p := g.process
	switch s.Kind {
	case selector.UID:
		return same(strconv.FormatUint(uint64(p.UID), 10), s.Value)
	case selector.User:
		wanted, err := user.Lookup(s.Value)
		if err != nil {
			return err
		}
		return same(strconv.FormatUint(uint64(p.UID), 10), wanted.Uid)
	}

	if p.unsure != nil {
		return p.unsure
	}
	h, err := p.held()
	if err != nil {
		return fmt.Errorf("the process cannot be looked at: %w", err)
	}
	switch s.Kind {
	case selector.GID:
		return same(strconv.FormatUint(uint64(h.gid), 10), s.Value)
	case selector.Group:
		groups, err := h.groups()
		if err != nil {
			return err
		}
		if !slices.ContainsFunc(groups, func(g uint32) bool { return strconv.FormatUint(uint64(g), 10) == s.Value }) {
			return fmt.Errorf("its supplementary groups are %d", groups)
		}
		return nil
	case selector.Path:
		if g.exe == nil {
			var exe executable
			exe, g.err = h.executable()
			g.exe = &exe
		}
		if g.err != nil {
			return g.err
		}
		return g.exe.runs(s.Value)
	case selector.Cmdline:
		digest, err := h.cmdline()
		if err != nil {
			return err
		}
		return same(digest, s.Value)
	case selector.Unit:
		at, err := h.place()
		if err != nil {
			return err
		}
		if at.unit == "" {
			return errors.New("it runs in no unit")
		}
		return same(at.unit, s.Value)
	case selector.Container:
		at, err := h.place()
		switch {
		case err != nil:
			return err
		case at.container == "":
			return errors.New("it runs in no container")
		case at.delegate != "":
			return delegated(at)
		}
		return same(at.container, s.Value)
	case selector.Run:
		return p.attestor.belongs(h, s.Value)
	case selector.SHA256:
		digest, err := p.attestor.digest(h)
		if err != nil {
			return err
		}
		return same(digest, s.Value)
	default: // of a later release: not satisfied
		return errLater
	}
}

func delegated(at place) error {
	return fmt.Errorf("its cgroup says container %s, and lies below %s, whose user could say so of any process", at.container, at.delegate)
}

// Seen is one selector of a process, or why it cannot be seen.
type Seen struct {
	Kind  string // selector.UID and so on
	Value string // empty with an Err
	Err   error
}

// Selectors are all that the agent sees of a process, as entries would have to name
// it, in a fixed order. It tells people; entries are decided by Satisfies.
func (p *Process) Selectors() []Seen {
	p.using.RLock()
	defer p.using.RUnlock()
	var list []Seen
	add := func(kind, value string, err error) {
		if err != nil {
			value = ""
		}
		list = append(list, Seen{kind, value, err})
	}
	uid := strconv.FormatUint(uint64(p.UID), 10)
	add(selector.UID, uid, nil)
	if u, err := user.LookupId(uid); err == nil {
		add(selector.User, u.Username, nil)
	} else {
		add(selector.User, "", err)
	}
	h, err := p.held()
	if err != nil {
		add(selector.Path, "", fmt.Errorf("the process cannot be looked at: %w", err))
		return list
	}
	add(selector.GID, strconv.FormatUint(uint64(h.gid), 10), nil)
	groups, err := h.groups()
	if err != nil {
		add(selector.Group, "", err)
	}
	for _, g := range groups {
		add(selector.Group, strconv.FormatUint(uint64(g), 10), nil)
	}
	exe, err := h.executable()
	if err == nil {
		err = exe.runs(exe.name)
	}
	add(selector.Path, exe.name, err)
	digest, err := p.attestor.digest(h)
	add(selector.SHA256, digest, err)
	cmdline, err := h.cmdline()
	add(selector.Cmdline, cmdline, err)
	at, err := h.place()
	if err != nil || at.unit != "" {
		add(selector.Unit, at.unit, err)
	}
	switch {
	case err != nil:
		add(selector.Container, "", err)
	case at.delegate != "":
		add(selector.Container, "", delegated(at))
	case at.container != "":
		add(selector.Container, at.container, nil)
	}
	if err := p.Alive(); err != nil {
		return []Seen{{selector.Path, "", err}} // what was read may be of nobody
	}
	return list
}

func same(got, want string) error {
	if got != want {
		return mismatch(got)
	}
	return nil
}
