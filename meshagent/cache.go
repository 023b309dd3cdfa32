package meshagent

import (
	"bytes"
	"context"
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"google.golang.org/protobuf/proto"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca/client"
	"github.com/entente-mesh/entente/ca/keystore"
	"github.com/entente-mesh/entente/internal/daemon"
)

const (
	cacheFile = "cache.sealed" // statev1.AgentCache

	// A write follows a change by cachePause, and takes no more than one part in
	// cacheShare of the time: on a host of thousands of entries some SVID is always new.
	cachePause = time.Second
	cacheShare = 50

	maxCache = 1 << 30 // bytes
)

// cache is the sealed copy of the agent's state on the disk. It belongs to run once New has
// read it.
type cache struct {
	log    *slog.Logger
	store  *store
	client *client.Client
	path   string
	sealer keystore.Sealer
	stands *State // the state on the disk; nil: unknown
}

// openCache returns nil when the configuration asks for none.
func openCache(cfg *Config, log *slog.Logger, store *store, client *client.Client) (*cache, error) {
	var sealer keystore.Sealer
	var err error
	switch {
	case cfg.Cache.PassphraseFile != "":
		sealer, err = keystore.PassphraseFile(cfg.Cache.PassphraseFile)
	case cfg.Cache.SystemdCredential != "":
		sealer, err = keystore.Credential(cfg.Cache.SystemdCredential)
	default:
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("the cache: %w", err)
	}
	return &cache{log: log, store: store, client: client, path: filepath.Join(cfg.DataDir, cacheFile), sealer: sealer}, nil
}

// read returns nil when nothing was kept yet.
func (c *cache) read() (*statev1.AgentCache, error) {
	info, err := os.Stat(c.path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err == nil && info.Size() > maxCache {
		err = fmt.Errorf("%s has %d bytes, at most %d are read", c.path, info.Size(), maxCache)
	}
	if err != nil {
		return nil, err
	}
	sealed, err := os.ReadFile(c.path)
	if err != nil {
		return nil, err
	}
	plain, err := c.sealer.Unseal(cacheFile, sealed)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", c.path, err)
	}
	defer clear(plain)
	kept := &statev1.AgentCache{}
	if err := proto.Unmarshal(plain, kept); err != nil {
		return nil, fmt.Errorf("%s is of another release, or damaged: %w", c.path, err)
	}
	return kept, nil
}

func (c *cache) write(kept *statev1.AgentCache) error {
	plain, err := proto.Marshal(kept)
	if err != nil {
		return err
	}
	sealed, err := c.sealer.Seal(cacheFile, plain)
	clear(plain)
	if err != nil {
		return err
	}
	return daemon.WriteFileAtomic(c.path, sealed, 0o600)
}

// recall takes up what a former process of this agent held, so that workloads are
// served before any CA node answers. What does not verify any more, or was signed for
// what its entry is no longer, is left out.
func (c *cache) recall(apply func(*client.View) error) error {
	kept, err := c.read()
	if err != nil || kept == nil || len(kept.GetPicture()) == 0 {
		return err
	}
	if err := c.client.Recall(kept.GetPicture()); err != nil {
		return err
	}
	if err := apply(c.client.View()); err != nil {
		return err
	}
	now := time.Now()
	state := c.store.State()
	svids, wits := map[string]*X509SVID{}, map[string]*WITSVID{}
	held := func(list []*statev1.HeldSVID, take func(*Identity, *statev1.HeldSVID, crypto.Signer) error) {
		for _, h := range list {
			identity, ok := state.Identity(h.GetEntryId())
			if !ok || !keptFor(identity, h) {
				continue
			}
			key, err := parseKey(h.GetKey())
			if err == nil {
				err = take(identity, h, key)
			}
			if err != nil {
				c.log.Info("an SVID that was kept is of no more use", "error", err)
			}
		}
	}
	held(kept.GetX509(), func(identity *Identity, h *statev1.HeldSVID, key crypto.Signer) error {
		svid, err := keptSVID(identity.ID, identity.record, h.GetCertificates(), key, state, now)
		if err == nil {
			svids[h.GetEntryId()] = svid
		}
		return err
	})
	held(kept.GetWit(), func(identity *Identity, h *statev1.HeldSVID, key crypto.Signer) error {
		wit, err := verifyWIT(identity.ID, identity.record, h.GetToken(), key, state, now)
		if err == nil {
			wits[h.GetEntryId()] = wit
		}
		return err
	})
	c.store.change(func(s *State) *State { return s.withSVIDs(svids).withWITs(wits) })
	c.log.Info("took up what the agent held before", "entries", len(state.Identities), "svids", len(svids))
	return nil
}

// keptFor reports whether an SVID was signed for the entry as it is now. The release before
// kept no hash.
func keptFor(identity *Identity, h *statev1.HeldSVID) bool {
	if len(h.GetRecord()) == 0 {
		return h.GetEntryRevision() == identity.record.Revision
	}
	return bytes.Equal(h.GetRecord(), identity.record.Hash[:])
}

func parseKey(der []byte) (crypto.Signer, error) {
	key, err := x509.ParsePKCS8PrivateKey(der)
	if err != nil {
		return nil, errors.New("its key cannot be read") // the parser's words may quote it
	}
	signer, ok := key.(crypto.Signer)
	if !ok {
		return nil, errors.New("its key cannot sign")
	}
	return signer, nil
}

// run writes the cache after changes, and a last time when ctx ends.
func (c *cache) run(ctx context.Context) error {
	failed := false
	for {
		state := c.store.State()
		began := time.Now()
		if err := c.update(state); err != nil {
			if !failed {
				c.log.Error("the cache is not up to date: after a restart without a CA the agent would serve what it held before; trying again", "error", err)
			}
			failed = true
			state = nil
		} else {
			failed = false
		}
		pause := time.NewTimer(max(cachePause, cacheShare*time.Since(began)))
		select {
		case <-pause.C:
		case <-ctx.Done():
		}
		pause.Stop()
		if state != nil {
			select {
			case <-state.Reissued():
			case <-ctx.Done():
			}
		}
		if ctx.Err() != nil {
			if err := c.update(c.store.State()); err != nil {
				c.log.Error("the cache lacks what the agent held last", "error", err)
			}
			return ctx.Err()
		}
	}
}

// update does nothing while the disk has it all.
func (c *cache) update(state *State) error {
	if !state.Ready || c.stands != nil && c.stands.reissued == state.reissued {
		return nil
	}
	kept := &statev1.AgentCache{}
	var err error
	if kept.Picture, err = c.client.Picture(); err != nil {
		return err
	}
	for _, identity := range state.Identities {
		h := func(signedFor *record, key []byte) *statev1.HeldSVID {
			return &statev1.HeldSVID{EntryId: identity.Entry.GetId(), EntryRevision: signedFor.Revision, Record: signedFor.Hash[:], Key: key}
		}
		if svid := identity.SVID; svid != nil {
			held := h(svid.signedFor, svid.Key)
			held.Certificates = svid.Certificates
			kept.X509 = append(kept.X509, held)
		}
		if wit := identity.WIT; wit != nil {
			key, err := x509.MarshalPKCS8PrivateKey(wit.Key)
			if err != nil {
				return err
			}
			held := h(wit.signedFor, key)
			held.Token = wit.Token.Reveal()
			kept.Wit = append(kept.Wit, held)
		}
	}
	if err := c.write(kept); err != nil {
		return err
	}
	c.stands = state
	return nil
}
