package node

import (
	"context"
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"os"
	"time"

	statev1 "github.com/entente-mesh/entente/api/entente/state/v1"
	"github.com/entente-mesh/entente/ca"
	"github.com/entente-mesh/entente/ca/domain"
	"github.com/entente-mesh/entente/ca/keystore"
	"github.com/entente-mesh/entente/ca/server"
	"github.com/entente-mesh/entente/internal/daemon"
	"github.com/entente-mesh/entente/internal/pemfile"
)

// upstream certifies this node's X.509 authorities.
type upstream interface {
	// Root is the certificate that verifiers hold.
	Root(ctx context.Context) (*x509.Certificate, error)
	// Certify signs an authority's certificate for a key, which may sign a request.
	// The answer is linted like any stranger's.
	Certify(ctx context.Context, template *x509.Certificate, key crypto.Signer) (der []byte, err error)
}

// openUpstream is nil where this node's authorities sign themselves.
func (c *Config) openUpstream() upstream {
	if c.Upstream.Certificate == "" {
		return nil
	}
	return diskUpstream{c}
}

// diskUpstream has the root's certificate and key in files. They are read at each use: a
// root is replaced by replacing them, and its key is in memory only while it signs.
type diskUpstream struct{ cfg *Config }

const upstreamKey = "upstream" // what the sealed key is bound to

func (d diskUpstream) Root(context.Context) (*x509.Certificate, error) {
	cfg := d.cfg
	text, err := os.ReadFile(cfg.Upstream.Certificate)
	if err != nil {
		return nil, fmt.Errorf("upstream.certificate: %w", err)
	}
	list, err := pemfile.Certificates(text, 1)
	if err != nil {
		return nil, fmt.Errorf("upstream.certificate: %s does not hold one PEM certificate and nothing else: %w", cfg.Upstream.Certificate, err)
	}
	root, err := ca.ParseUpstream(list[0].Raw, cfg.trustDomain())
	if err != nil {
		return nil, fmt.Errorf("upstream.certificate: %s: %w", cfg.Upstream.Certificate, err)
	}
	return root, nil
}

func (d diskUpstream) Certify(ctx context.Context, template *x509.Certificate, key crypto.Signer) ([]byte, error) {
	root, err := d.Root(ctx)
	if err != nil {
		return nil, err
	}
	rootKey, err := d.key()
	if err != nil {
		return nil, err
	}
	if err := fits(rootKey, root); err != nil {
		return nil, err
	}
	der, err := x509.CreateCertificate(rand.Reader, template, root, key.Public(), rootKey)
	if err != nil {
		return nil, fmt.Errorf("sign by the upstream: %w", err)
	}
	return der, nil
}

func (d diskUpstream) key() (crypto.Signer, error) {
	cfg := d.cfg
	if name := cfg.Upstream.KeyCredential; name != "" {
		key, err := keystore.CredentialKey(name)
		if err != nil {
			return nil, fmt.Errorf("upstream.keyCredential: %w", err)
		}
		return key, nil
	}
	sealer, err := cfg.sealer()
	if err == nil {
		var key crypto.Signer
		if key, err = keystore.LoadKey(cfg.Upstream.Key, sealer, upstreamKey, cfg.Keys.InsecureDev); err == nil {
			return key, nil
		}
	}
	return nil, fmt.Errorf("upstream.key: %w", err)
}

// SealUpstreamKey makes of a root's key, PEM, what upstream.key may name.
func SealUpstreamKey(cfg *Config, text []byte) ([]byte, error) {
	sealer, err := cfg.sealer()
	if err != nil {
		return nil, err
	}
	return keystore.SealKey(sealer, upstreamKey, text)
}

// checkUpstream tries everything but signing, before a node is set up.
func (c *Config) checkUpstream(phase time.Duration) error {
	up := c.openUpstream()
	if up == nil {
		return nil
	}
	root, err := up.Root(context.Background())
	if err != nil {
		return err
	}
	if err := ca.CheckUpstreamLife(root, phase, time.Now()); err != nil {
		return err
	}
	key, err := diskUpstream{c}.key()
	if err != nil {
		return err
	}
	return fits(key, root)
}

func fits(key crypto.Signer, root *x509.Certificate) error {
	if public, ok := key.Public().(interface{ Equal(crypto.PublicKey) bool }); !ok || !public.Equal(root.PublicKey) {
		return errors.New("the upstream's key is not that of its certificate")
	}
	return nil
}

// followUpstream notices at once, and not when the next authority is to be certified, that
// certificate and key cannot be used or do not belong together.
func (c *Config) followUpstream(files *daemon.Files) *daemon.Followed[struct{}] {
	names := []string{c.Upstream.Certificate}
	if c.Upstream.Key != "" {
		names = append(names, c.Upstream.Key)
	}
	disk := diskUpstream{c}
	followed, _ := daemon.Follow(files, "upstream", func([][]byte) (none struct{}, err error) {
		root, err := disk.Root(context.Background())
		if err != nil {
			return none, err
		}
		key, err := disk.key()
		if err != nil {
			return none, err
		}
		return none, fits(key, root)
	}, names...)
	return followed // what is wrong is a problem of files
}

// certifiedAuthority is an authority that the upstream certified.
func (as *authorities) certifiedAuthority(ctx context.Context, key crypto.Signer, request ca.AuthorityRequest) (*statev1.Authority, error) {
	root, _, err := as.usableUpstream(request.Now)
	if err != nil {
		return nil, err
	}
	request.Upstream = root
	template, err := ca.AuthorityTemplate(request)
	if err != nil {
		return nil, err
	}
	der, err := as.upstream.Certify(ctx, template, key)
	if err != nil {
		return nil, err
	}
	return ca.NewAuthority(as.td, as.own.id, der, root.Raw, request.Phase, request.Now)
}

// upstreamStatus looks at the root as it is now; nil without one.
func (as *authorities) upstreamStatus(now time.Time) *server.Upstream {
	if as.upstream == nil {
		return nil
	}
	root, phase, err := as.usableUpstream(now)
	s := &server.Upstream{}
	if root != nil {
		s.KeyID, s.NotAfter = ca.KeyID(root.RawSubjectPublicKeyInfo), root.NotAfter
	}
	if err != nil {
		s.Problem = err.Error()
	} else if last := ca.UpstreamCertifiesUntil(root, phase); last.Sub(now) < ca.UpstreamWarning*phase {
		s.Problem = fmt.Sprintf("it certifies nothing from %s on: put a new root in its place (docs/how-to/certify-by-a-root.md)", last.UTC().Format(time.RFC3339))
	}
	return s
}

func (as *authorities) upstreamCertifies(now time.Time) time.Duration {
	root, phase, err := as.usableUpstream(now)
	if err != nil {
		return 0
	}
	return ca.UpstreamCertifiesUntil(root, phase).Sub(now)
}

// usableUpstream says why the root certifies nothing now. The root may be known all the
// same.
func (as *authorities) usableUpstream(now time.Time) (root *x509.Certificate, phase time.Duration, err error) {
	if root, err = as.upstream.Root(context.Background()); err != nil {
		return nil, 0, err
	}
	as.Read(func(st *domain.State) {
		phase = st.Lifetimes().Phase
		err = server.CheckUpstream(st, root.Raw)
	})
	if err == nil {
		err = ca.CheckUpstreamLife(root, phase, now)
	}
	if problem := as.upstreamFiles.Problem(); err == nil && problem != nil {
		err = errors.New(problem.Why)
	}
	return root, phase, err
}

// watchUpstream says in the log what the status shows, once a day and when it changes.
func (as *authorities) watchUpstream(ctx context.Context) error {
	var said string
	var at time.Time
	for {
		if s := as.upstreamStatus(time.Now()); s.Problem != "" && (s.Problem != said || time.Since(at) > 24*time.Hour) {
			said, at = s.Problem, time.Now()
			as.log.Error("the upstream needs attention", "error", s.Problem)
		}
		if err := sleep(ctx, time.Minute); err != nil {
			return err
		}
	}
}
