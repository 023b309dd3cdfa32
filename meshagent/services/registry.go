package services

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/entente-mesh/entente/internal/daemon"
	"github.com/entente-mesh/entente/internal/safepath"
	"github.com/entente-mesh/entente/internal/yamlfile"
)

// FromCommand is the source of registrations that were made by command.
const FromCommand = "command"

// Registry holds the registrations of a host, from all sources. For each service one of
// them counts: what was registered by command, else what stands in the drop-in directory,
// else in the agent's file. Its methods may be called concurrently.
type Registry struct {
	own     []Registration // of the agent's file
	dir     string
	path    string // where what was said by command is kept
	log     *slog.Logger
	changed func()
	reread  chan struct{} // capacity 1

	mu       sync.Mutex
	commands []Registration
	drains   map[string]*drain
	files    map[string]*dropIn // by name
	broken   map[string]error   // what cannot be used, by file
	current  atomic.Pointer[Snapshot]
}

// dropIn is a file of the directory as it was last good.
type dropIn struct {
	stamp         string
	registrations []Registration
}

// drain is why a service is drained here. kept: by command, until it is restored;
// holders: by those who are on the line.
type drain struct {
	kept    bool
	holders int
	within  time.Duration // 0: as the registration says
}

// kept is the form of the file in the data directory.
type kept struct {
	yamlfile.Pos
	Services []Registration `yaml:"services"`
	Drained  []string       `yaml:"drained"`
}

// Snapshot is what a registry holds at one moment. It is immutable.
type Snapshot struct {
	services map[string][]Registered
	drains   map[string]time.Duration
	broken   []Broken
}

// Registered is a registration with its source: FILE:LINE or FromCommand.
type Registered struct {
	*Registration
	Source string
}

// Broken is a file whose newest content is not used.
type Broken struct {
	File string `json:"file"`
	Why  string `json:"why"`
}

// Of are the registrations of a service, the one that counts first.
func (s *Snapshot) Of(service string) []Registered { return s.services[service] }

// Services are the names that are registered, in order.
func (s *Snapshot) Services() []string { return slices.Sorted(maps.Keys(s.services)) }

// Drained says whether a service is to be drained, and how long its requests may take;
// 0: as the registration says.
func (s *Snapshot) Drained(service string) (within time.Duration, drained bool) {
	within, drained = s.drains[service]
	return within, drained
}

// Broken are the files whose newest content is not used.
func (s *Snapshot) Broken() []Broken { return s.broken }

// Open reads all sources. What cannot be read counts for nothing and is shown as broken:
// a host's other services do not suffer from it.
func Open(own []Registration, dir, dataDir string, log *slog.Logger, changed func()) *Registry {
	r := &Registry{own: own, dir: dir, path: filepath.Join(dataDir, "services.yaml"), log: log, changed: changed, reread: make(chan struct{}, 1),
		drains: map[string]*drain{}, files: map[string]*dropIn{}, broken: map[string]error{}}
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := r.recall(); err != nil {
		r.complain(r.path, err)
	}
	r.readDir()
	r.current.Store(r.snapshot())
	return r
}

// Snapshot is what the registry holds now.
func (r *Registry) Snapshot() *Snapshot { return r.current.Load() }

func (r *Registry) recall() error {
	text, err := os.ReadFile(r.path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	var k kept
	if err := yamlfile.Decode(r.path, bytes.NewReader(text), &k); err != nil {
		return err
	}
	if errs := Inspect(k.Services); len(errs) > 0 {
		return errs
	}
	r.commands = k.Services
	for _, name := range k.Drained {
		r.drains[name] = &drain{kept: true}
	}
	return nil
}

// keep takes what was said by command, on the disk first. mu is held.
func (r *Registry) keep(commands []Registration, drained map[string]bool) error {
	text, err := yamlfile.Marshal(kept{Services: commands, Drained: slices.Sorted(maps.Keys(drained))})
	if err != nil {
		return err
	}
	if err := daemon.WriteFileAtomic(r.path, text, 0o600); err != nil {
		return fmt.Errorf("nothing was changed: it could not be kept: %w", err)
	}
	delete(r.broken, r.path)
	r.commands = commands
	return nil
}

// edit makes a change, and what comes of it current.
func (r *Registry) edit(change func() error) error {
	r.mu.Lock()
	err := change()
	if err == nil {
		r.current.Store(r.snapshot())
	}
	r.mu.Unlock()
	if err == nil {
		r.changed()
	}
	return err
}

func (r *Registry) snapshot() *Snapshot {
	s := &Snapshot{services: map[string][]Registered{}, drains: map[string]time.Duration{}}
	add := func(registrations []Registration, source func(*Registration) string) {
		for i := range registrations {
			name := registrations[i].Service
			s.services[name] = append(s.services[name], Registered{&registrations[i], source(&registrations[i])})
		}
	}
	place := func(r *Registration) string { return r.Pos.String() }
	add(r.commands, func(*Registration) string { return FromCommand })
	for _, name := range slices.Sorted(maps.Keys(r.files)) {
		add(r.files[name].registrations, place)
	}
	add(r.own, place)
	for name, d := range r.drains {
		s.drains[name] = d.within
	}
	for _, file := range slices.Sorted(maps.Keys(r.broken)) {
		s.broken = append(s.broken, Broken{file, r.broken[file].Error()})
	}
	return s
}

// drained are the services that stay drained when the agent is restarted. mu is held.
func (r *Registry) drained() map[string]bool {
	names := map[string]bool{}
	for name, d := range r.drains {
		if d.kept {
			names[name] = true
		}
	}
	return names
}

// Register takes registrations by command, in the place of those that were made so for the
// same services.
func (r *Registry) Register(registrations []Registration) error {
	return r.edit(func() error {
		commands := slices.Clone(r.commands)
		for _, fresh := range registrations {
			commands = slices.DeleteFunc(commands, func(old Registration) bool { return old.Service == fresh.Service })
			commands = append(commands, fresh)
		}
		if len(commands) > MaxServices {
			return fmt.Errorf("a host registers at most %d services", MaxServices)
		}
		return r.keep(commands, r.drained())
	})
}

// Deregister takes a registration back that was made by command.
func (r *Registry) Deregister(service string) error {
	return r.edit(func() error {
		commands := slices.DeleteFunc(slices.Clone(r.commands), func(c Registration) bool { return c.Service == service })
		if len(commands) < len(r.commands) {
			return r.keep(commands, r.drained())
		}
		if known := r.Snapshot().Of(service); len(known) > 0 {
			return fmt.Errorf("service %s was not registered by command: it stands at %s, take it out there", service, known[0].Source)
		}
		return fmt.Errorf("service %s was not registered by command", service)
	})
}

// Drain has a service drained until it is restored. within: how long requests under way
// may take; 0: as the registration says.
func (r *Registry) Drain(service string, within time.Duration) error {
	return r.edit(func() error {
		names := r.drained()
		names[service] = true
		if err := r.keep(r.commands, names); err != nil {
			return err
		}
		r.drain(service, within).kept = true
		return nil
	})
}

// Hold has a service drained until release is called, or as long as the agent runs.
func (r *Registry) Hold(service string, within time.Duration) (release func()) {
	var d *drain
	r.edit(func() error {
		d = r.drain(service, within)
		d.holders++
		return nil
	})
	return sync.OnceFunc(func() {
		r.edit(func() error {
			if d.holders--; d.holders == 0 && !d.kept && r.drains[service] == d {
				delete(r.drains, service)
			}
			return nil
		})
	})
}

// Restore ends every drain of a service.
func (r *Registry) Restore(service string) error {
	return r.edit(func() error {
		names := r.drained()
		delete(names, service)
		if err := r.keep(r.commands, names); err != nil {
			return err
		}
		delete(r.drains, service)
		return nil
	})
}

// drain is the drain of a service. mu is held.
func (r *Registry) drain(service string, within time.Duration) *drain {
	d := r.drains[service]
	if d == nil {
		d = &drain{}
		r.drains[service] = d
	}
	d.within = within
	return d
}

// Reread has the directory read now.
func (r *Registry) Reread() {
	select {
	case r.reread <- struct{}{}:
	default:
	}
}

// lookEvery is how often the directory is looked at. What has changed is read when two
// looks have found the same, so that a file that is being written is left in peace.
const lookEvery = 250 * time.Millisecond

// Run follows the directory until ctx ends.
func (r *Registry) Run(ctx context.Context) error {
	ticker := time.NewTicker(lookEvery)
	defer ticker.Stop()
	read := r.look()
	seen := read
	for {
		now := false
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-r.reread:
			now = true
		case <-ticker.C:
		}
		found := r.look()
		if stable := found == seen && found != read; now || stable {
			r.edit(func() error { r.readDir(); return nil })
			read = found
		}
		seen = found
	}
}

// entries are the drop-in files, by name.
func (r *Registry) entries() (map[string]fs.FileInfo, error) {
	list, err := os.ReadDir(r.dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	found := map[string]fs.FileInfo{}
	for _, entry := range list {
		if name := entry.Name(); strings.HasSuffix(name, ".yaml") && name[0] != '.' {
			if info, err := os.Stat(filepath.Join(r.dir, name)); err == nil {
				found[name] = info
			}
		}
	}
	if len(found) > MaxServices {
		return nil, fmt.Errorf("%s has more than %d files", r.dir, MaxServices)
	}
	return found, nil
}

// look says in one word what the directory is like.
func (r *Registry) look() string {
	found, err := r.entries()
	if err != nil {
		return err.Error()
	}
	var b strings.Builder
	for _, name := range slices.Sorted(maps.Keys(found)) {
		fmt.Fprintln(&b, name, stampOf(found[name]))
	}
	return b.String()
}

func stampOf(info fs.FileInfo) string {
	inode := uint64(0)
	if sys, ok := info.Sys().(*syscall.Stat_t); ok {
		inode = uint64(sys.Ino)
	}
	return fmt.Sprint(inode, info.Size(), info.ModTime().UnixNano(), info.Mode())
}

// readDir reads what is new. A file that is broken leaves what it last said. mu is held.
func (r *Registry) readDir() {
	found, err := r.entries()
	if err == nil && len(found) > 0 {
		err = r.trustworthyDir()
	}
	if err != nil {
		r.complain(r.dir, err)
		return
	}
	delete(r.broken, r.dir)
	for name := range r.files {
		if found[name] == nil {
			delete(r.files, name)
		}
	}
	first := map[string]string{} // where a service stands
	for name, f := range r.files {
		for i := range f.registrations {
			if f.stamp == stampOf(found[name]) {
				first[f.registrations[i].Service] = f.registrations[i].Pos.String()
			}
		}
	}
	for _, name := range slices.Sorted(maps.Keys(found)) {
		path, stamp := filepath.Join(r.dir, name), stampOf(found[name])
		if f := r.files[name]; f != nil && f.stamp == stamp {
			continue
		}
		registrations, err := readFile(path)
		if err == nil {
			err = notTwice(registrations, first)
		}
		if err != nil {
			r.complain(path, err)
			continue
		}
		delete(r.broken, path)
		for i := range registrations {
			first[registrations[i].Service] = registrations[i].Pos.String()
		}
		r.files[name] = &dropIn{stamp, registrations}
		r.log.Info("services registered", "file", path, "services", len(registrations))
	}
	for path := range r.broken {
		if filepath.Dir(path) == r.dir && found[filepath.Base(path)] == nil {
			delete(r.broken, path)
		}
	}
}

// complain logs each complaint once. mu is held.
func (r *Registry) complain(path string, err error) {
	if was := r.broken[path]; was == nil || was.Error() != err.Error() {
		r.log.Error("registrations of services cannot be used; the last good ones stay", "file", path, "error", err)
	}
	r.broken[path] = err
}

func notTwice(registrations []Registration, first map[string]string) error {
	var errs yamlfile.Errors
	for i := range registrations {
		r := &registrations[i]
		if at, twice := first[r.Service]; twice {
			errs = append(errs, r.At("service").Errorf("service %s is registered at %s already", r.Service, at))
		}
	}
	if len(errs) > 0 {
		return errs
	}
	return nil
}

func readFile(path string) ([]Registration, error) {
	f, _, err := safepath.OpenFile(path)
	if err != nil {
		return nil, unsafePath(err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err == nil {
		err = trustworthy(path, info)
	}
	if err != nil {
		return nil, err
	}
	return Read(path, f)
}

func (r *Registry) trustworthyDir() error {
	dir, err := safepath.OpenDir(r.dir)
	if err != nil {
		return unsafePath(err)
	}
	defer dir.Close()
	info, err := dir.Stat()
	if err != nil {
		return err
	}
	return trustworthy(r.dir, info)
}

// unsafePath says why it matters.
func unsafePath(err error) error {
	if errors.Is(err, safepath.ErrUnsafe) {
		return fmt.Errorf("commands of registrations run as the agent: %w", err)
	}
	return err
}

// trustworthy refuses what somebody else than root and the agent's user may change:
// commands in it run as the agent.
func trustworthy(path string, info fs.FileInfo) error {
	sys, ok := info.Sys().(*syscall.Stat_t)
	if !ok || sys.Uid != 0 && int(sys.Uid) != os.Geteuid() {
		return fmt.Errorf("%s belongs to neither root nor the agent's user, and commands in it would run as the agent: chown it to root", path)
	}
	if info.Mode().Perm()&0o022 != 0 {
		return fmt.Errorf("%s has mode %04o: others may change it, and commands in it would run as the agent: chmod go-w it", path, info.Mode().Perm())
	}
	return nil
}
