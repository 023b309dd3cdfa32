// Package files writes identities to files, for software that reads nothing else,
// and tells that software when they are other ones.
//
// What the host's administrator lists in the agent's configuration is written; the
// operating system decides who reads it. So the key goes only to the user that the
// entry names, or to root.
//
// Files that belong together are first written under other names and synced, and
// then renamed one directly after the other, the key last: whoever reads each of
// them at any moment reads a whole file, and a crash leaves old ones or new ones but
// for the instant between two renames. Software that reads while it is being told is
// told afterwards; what cannot bear that instant takes one combined file.
//
// Files of an entry that is gone stay: what they hold ends with the SVID.
package files

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"os/user"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"

	"github.com/entente-mesh/entente/ca/selector"
	"github.com/entente-mesh/entente/federation/bundle"
	"github.com/entente-mesh/entente/internal/safepath"
	"github.com/entente-mesh/entente/meshagent"
)

const (
	publicMode = 0o644

	retryFirst = 200 * time.Millisecond
	retryMost  = time.Minute

	maxOutput = 4 << 10 // bytes of a failed command's output that are logged
)

// Writer writes what an agent's configuration lists under files.
type Writer struct {
	agent *meshagent.Agent
	log   *slog.Logger
}

// New returns a writer; log may be nil.
func New(agent *meshagent.Agent, log *slog.Logger) *Writer {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	return &Writer{agent, log}
}

// Run writes until ctx ends. Nothing that goes wrong with a file ends it: it is
// tried again.
func (w *Writer) Run(ctx context.Context) error {
	var all sync.WaitGroup
	for i := range w.agent.Config().Files {
		target := &target{agent: w.agent, config: &w.agent.Config().Files[i], tokens: map[string]string{}, log: w.log.With("service", w.agent.Config().Files[i].Service)}
		all.Go(func() { w.keep(ctx, target) })
	}
	all.Wait()
	<-ctx.Done()
	return ctx.Err()
}

// target is one entry of the configuration. It belongs to one goroutine.
type target struct {
	agent   *meshagent.Agent
	config  *meshagent.FilesConfig
	log     *slog.Logger
	written [sha256.Size]byte // digest of what stands on the disk
	tokens  map[string]string // JWT-SVIDs that stand on the disk, by path
	renew   time.Time         // when one of them is to be fetched again; zero: there is none
	told    bool              // the software knows of it
	absent  bool              // it was logged that there is no entry
}

// keep writes one target anew with every change, and tries again what failed.
func (w *Writer) keep(ctx context.Context, t *target) {
	failures := 0
	delivery := w.agent.Deliver("files of " + t.config.Service)
	defer delivery.Close()
	for {
		state := w.agent.State()
		err := t.update(ctx, state)
		if err == nil {
			delivery.Got(state)
		}
		var again <-chan time.Time
		if err != nil && ctx.Err() == nil {
			if failures == 0 {
				t.log.Error("files are not up to date; trying again", "error", err)
			}
			failures++
			again = time.After(min(retryFirst<<min(failures-1, 16), retryMost))
		} else {
			failures = 0
			if !t.renew.IsZero() {
				again = time.After(max(time.Until(t.renew), retryFirst))
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-state.Reissued():
		case <-again:
		}
	}
}

// update brings the files to the state, and tells the software.
func (t *target) update(ctx context.Context, state *meshagent.State) error {
	identity, ok := state.Service(t.config.Service)
	if state.Ready && !ok && !t.absent {
		t.log.Warn("this host has no such service; what was written for it stays until its SVID ends")
	}
	t.absent = state.Ready && !ok
	if !ok || identity.SVID == nil || state.Bundle == nil {
		return nil
	}
	list, err := t.contents(state, identity)
	if err != nil {
		return err
	}
	owner, err := t.owner(identity)
	if err != nil {
		return err
	}
	users := users(identity, owner)
	digest := sha256.New()
	for _, f := range list {
		fmt.Fprintf(digest, "%d:%s", len(f.data), f.data)
	}
	if sum := [sha256.Size]byte(digest.Sum(nil)); sum != t.written {
		if err := write(list, owner, users...); err != nil {
			return err
		}
		t.written, t.told = sum, false
		t.log.Info("files written", "spiffe_id", identity.ID, "valid_until", identity.SVID.NotAfter)
	}
	// The certificate is of use without the tokens, and so the software is told of it.
	unsigned := t.updateTokens(ctx, identity, owner, users)
	if !t.told {
		if err := t.tell(ctx, users); err != nil {
			return errors.Join(unsigned, err)
		}
		t.told = true
	}
	return unsigned
}

// updateTokens writes the JWT-SVIDs that are other ones.
func (t *target) updateTokens(ctx context.Context, identity *meshagent.Identity, owner ids, users []int) error {
	var errs []error
	t.renew = time.Time{}
	for i := range t.config.JWTs {
		jwt := &t.config.JWTs[i]
		token, renew, err := t.agent.FetchJWT(ctx, identity, jwt.Audience)
		if err == nil && token != t.tokens[jwt.Path] {
			err = write([]file{{jwt.Path, os.FileMode(t.config.Mode), []byte(token)}}, owner, users...)
			if err == nil {
				t.tokens[jwt.Path], t.told = token, false
			}
		}
		if err != nil {
			errs = append(errs, err)
			continue
		}
		if t.renew.IsZero() || renew.Before(t.renew) {
			t.renew = renew
		}
	}
	return errors.Join(errs...)
}

// contents are the files in the order in which they are to appear.
func (t *target) contents(state *meshagent.State, identity *meshagent.Identity) (list []file, err error) {
	chain, key := identity.SVID.PEM()
	own, err := state.Bundle.Marshal()
	if err != nil {
		return nil, fmt.Errorf("the bundle: %w", err)
	}
	add := func(path string, mode os.FileMode, data []byte) {
		if path != "" {
			list = append(list, file{path, mode, data})
		}
	}
	secret := os.FileMode(t.config.Mode)
	add(t.config.Bundle, publicMode, own)
	if t.config.BundleMap != "" {
		all, err := bundleMap(state.Bundle, identity.Federated)
		if err != nil {
			return nil, err
		}
		add(t.config.BundleMap, publicMode, all)
	}
	add(t.config.Combined, secret, slices.Concat(chain, key))
	add(t.config.Certificate, publicMode, chain)
	add(t.config.Key, secret, key)
	return list, nil
}

// bundleMap holds X.509 authorities: what reads it verifies TLS peers.
func bundleMap(own *x509bundle.Bundle, federated []*x509bundle.Bundle) ([]byte, error) {
	var all []*bundle.Bundle
	for _, b := range append([]*x509bundle.Bundle{own}, federated...) {
		all = append(all, &bundle.Bundle{TrustDomain: b.TrustDomain(), X509: b.X509Authorities()})
	}
	return bundle.MarshalMap(all...)
}

// ids are an owner and a group; -1: as the agent's.
type ids struct{ uid, gid int }

// owner refuses to hand the key to a user whom the entry does not name.
func (t *target) owner(identity *meshagent.Identity) (ids, error) {
	o := ids{-1, -1}
	reader := os.Geteuid()
	if name := t.config.Owner; name != "" {
		uid, err := lookup(name, func(name string) (string, error) {
			u, err := user.Lookup(name)
			if err != nil {
				return "", err
			}
			return u.Uid, nil
		})
		if err != nil {
			return o, fmt.Errorf("files.owner: %w", err)
		}
		o.uid, reader = uid, uid
	}
	if name := t.config.Group; name != "" {
		gid, err := lookup(name, func(name string) (string, error) {
			g, err := user.LookupGroup(name)
			if err != nil {
				return "", err
			}
			return g.Gid, nil
		})
		if err != nil {
			return o, fmt.Errorf("files.group: %w", err)
		}
		o.gid = gid
	}
	if t.config.Key == "" && t.config.Combined == "" && len(t.config.JWTs) == 0 || reader == 0 {
		return o, nil
	}
	for _, text := range identity.Demands {
		switch s, err := selector.Parse(text); {
		case err != nil: // of a later release: no process satisfies it
		case s.Kind == selector.UID && s.Value != strconv.Itoa(reader):
			return o, fmt.Errorf("the secret of %s would belong to uid %d, and its entry names uid %s: set files.owner", identity.ID, reader, s.Value)
		case s.Kind == selector.User:
			if u, err := user.Lookup(s.Value); err != nil || u.Uid != strconv.Itoa(reader) {
				return o, fmt.Errorf("the secret of %s would belong to uid %d, and its entry names user %s: set files.owner", identity.ID, reader, s.Value)
			}
		}
	}
	return o, nil
}

// users are those whom the files are meant for: their owner and the user whom the entry
// names. They may own directories on the way to the files and the pid file.
func users(identity *meshagent.Identity, owner ids) (list []int) {
	if owner.uid >= 0 {
		list = append(list, owner.uid)
	}
	for _, text := range identity.Common() {
		s, err := selector.Parse(text)
		id := ""
		switch {
		case err != nil:
		case s.Kind == selector.UID:
			id = s.Value
		case s.Kind == selector.User:
			if u, err := user.Lookup(s.Value); err == nil {
				id = u.Uid
			}
		}
		if uid, err := strconv.Atoi(id); err == nil && !slices.Contains(list, uid) {
			list = append(list, uid)
		}
	}
	return list
}

// lookup reads a number, or has a name looked up.
func lookup(name string, find func(string) (string, error)) (int, error) {
	if id, err := strconv.ParseUint(name, 10, 31); err == nil {
		return int(id), nil
	}
	text, err := find(name)
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(text)
}

// tell runs the command or sends the signal.
func (t *target) tell(ctx context.Context, users []int) error {
	after := t.config.After
	switch {
	case len(after.Command) > 0:
		ctx, cancel := context.WithTimeout(ctx, after.Timeout)
		defer cancel()
		cmd := exec.CommandContext(ctx, after.Command[0], after.Command[1:]...)
		cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
		cmd.WaitDelay = 5 * time.Second
		var output tail
		cmd.Stdout, cmd.Stderr = &output, &output
		if err := cmd.Run(); err != nil {
			if ctx.Err() != nil {
				err = fmt.Errorf("%w after %s", ctx.Err(), after.Timeout)
			}
			return fmt.Errorf("files.after.command %q: %w; it said: %s", after.Command[0], err, strings.TrimSpace(string(output)))
		}
	case after.Signal != "":
		return signal(after.PIDFile, signals[after.Signal], users)
	}
	return nil
}

var signals = map[string]syscall.Signal{"HUP": syscall.SIGHUP, "USR1": syscall.SIGUSR1, "USR2": syscall.SIGUSR2}

// signal signals the process of a pid file. That it does not run is no failure: it
// reads the files when it starts.
//
// What the file says is worth as much as who can change it: if that is one of the users,
// the process must be that user's own, whom he could signal himself. Otherwise it must be
// root's, the agent's or one of the users'.
func signal(pidFile string, s syscall.Signal, users []int) error {
	f, by, err := safepath.OpenFile(pidFile, users...)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("files.after.pidFile: %w", err)
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, 32))
	if err != nil {
		return fmt.Errorf("files.after.pidFile: %w", err)
	}
	pid, err := strconv.ParseInt(strings.TrimSpace(string(text)), 10, 32)
	if err != nil || pid <= 1 {
		return fmt.Errorf("files.after.pidFile: %s holds no process number", pidFile)
	}
	of := by
	switch len(by) {
	case 0:
		of = append([]int{0, os.Geteuid()}, users...)
	case 1:
	default:
		return fmt.Errorf("files.after.pidFile: users %d can change %s: it must be one user's", by, pidFile)
	}
	err = kill(int(pid), s, of)
	if errors.Is(err, syscall.ESRCH) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("files.after.signal: process %d of %s: %w", pid, pidFile, err)
	}
	return nil
}

// checkUser refuses a process that is not wholly one of these users'.
func checkUser(real, effective int, of []int) error {
	for _, uid := range []int{real, effective} {
		if !slices.Contains(of, uid) {
			return fmt.Errorf("it runs as uid %d, and only a process of uid %s is signalled: see files.owner and the owner of the pid file", uid, list(of))
		}
	}
	return nil
}

func list(uids []int) string {
	uids = slices.Compact(slices.Sorted(slices.Values(uids)))
	return strings.Trim(strings.ReplaceAll(fmt.Sprint(uids), " ", " or "), "[]")
}

// tail keeps the end of what is written to it.
type tail []byte

func (t *tail) Write(b []byte) (int, error) {
	*t = append(*t, b...)
	if len(*t) > maxOutput {
		*t = (*t)[len(*t)-maxOutput:]
	}
	return len(b), nil
}
